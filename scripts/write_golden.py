"""Write the golden vectors in tests/golden, which the Python and the C++ tests read.

Run it only where the generator is changed on purpose: every seed then gives another picture.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meancache_trt.manifest import TiledAxis, Tiling
from meancache_trt.meancache.methods import METHODS
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.sigmas import Convention, MuRule, grid_from_config, make_grid
from meancache_trt.tiling import Level, decode_tiled, image_shape, levels

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"

NOISE_HEAD = """\
# Initial noise of meancache/noise.py and engine/host/noise.hpp; written by scripts/write_golden.py.
# A case is a line "seed N", a line "shape" with the dimensions, then one value a line, row-major.
# Nine digits give a float32 back exactly.
"""

# Both halves of the key, sizes that end within a block, an image's and a video's rank.
NOISE_CASES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (0, (4, 4, 4)),
    (1, (1, 1, 1)),
    (42, (3, 5, 7)),
    (2**32 + 7, (2, 3, 3, 3)),
    (2**64 - 1, (1, 2, 5)),
)


def noise_text() -> str:
    """All of `noise.txt`."""
    lines = [NOISE_HEAD]
    for seed, shape in NOISE_CASES:
        lines.append(f"seed {seed}\nshape {' '.join(map(str, shape))}\n")
        lines += [f"{value:.9g}\n" for value in philox_normal(seed, shape).ravel().tolist()]
    return "".join(lines)


FLUX = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
QWEN = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192}
WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 3.0,
}
GRID_CASES: tuple[tuple[str, Convention, int, int, dict[str, Any]], ...] = (
    ("static shift", "linspace", 50, 64, {"shift": 3.0}),
    ("one step", "linspace", 1, 64, {"shift": 3.0}),
    ("FLUX.1-dev at 1024", "linspace", 28, 4096, FLUX),
    ("FLUX.1-dev at 1280x720", "linspace", 50, 3600, FLUX),
    ("Qwen-Image with a terminal", "linspace", 50, 6032, {**QWEN, "shift_terminal": 0.02}),
    ("linear dynamic shift", "linspace", 20, 2048, {**FLUX, "time_shift_type": "linear"}),
    ("HunyuanVideo", "linspace_to_zero", 50, 7200, {"shift": 7.0}),
    ("a count alone", "count", 40, 1024, {"shift": 3.0}),
    ("a count, dynamic", "count", 30, 1024, FLUX),
    ("Wan at 480 pixels", "count", 50, 32760, WAN),
    ("Wan at 720 pixels", "count", 40, 75600, {**WAN, "flow_shift": 5.0}),
    ("Wan, one step", "count", 1, 16, WAN),
    ("Wan with a terminal", "count", 20, 16, {**WAN, "shift_terminal": 0.1}),
)
"""Name, convention, steps, image tokens and scheduler configuration; mu lies on a line."""

# Steps and image tokens of FLUX.2, whose mu no longer depends on the steps above 4300 tokens.
EMPIRICAL_CASES = ((50, 4096), (10, 4096), (28, 4300), (28, 4301), (50, 9216))


def grids_text() -> str:
    """All of `grids.json`: what `grid_from_config` makes of each case."""
    cases = []
    rules: list[tuple[MuRule, str, Convention, int, int, dict[str, Any]]] = [
        *(("line", *case) for case in GRID_CASES),
        *(("empirical", "FLUX.2", "linspace", *case, FLUX) for case in EMPIRICAL_CASES),
    ]
    for rule, name, convention, steps, tokens, config in rules:
        grid = grid_from_config(
            config, steps, convention=convention, mu_rule=rule, image_tokens=tokens
        )
        cases.append(
            {
                "name": name,
                "convention": convention,
                "mu": rule,
                "steps": steps,
                "image_tokens": tokens,
                "config": config,
                "sigmas": grid.sigmas,
                "timesteps": grid.timesteps,
            }
        )
    return _json(cases)


FOLD_CASES: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = (
    (20, (0, 1, 3, 6, 11, 15), (1, 2, 2, 4, 3)),
    (20, (0, 5, 10, 15), (1, 6, 1)),
    (8, tuple(range(8)), (1, 2, 3, 1, 2, 1, 4)),
    (5, (0,), ()),
)
"""Steps, nodes and spans; every method folds each of them."""


def folds_text() -> str:
    """All of `folds.json`."""
    cases = []
    for (steps, nodes, spans), method in itertools.product(FOLD_CASES, METHODS.values()):
        grid = make_grid(steps, shift=3.0)
        used = spans if method.uses_spans else None
        cases.append(
            {
                "method": method.name,
                "sigmas": grid.sigmas,
                "nodes": nodes,
                "spans": used,
                "weights": method.fold(grid.array(), nodes, used),
            }
        )
    return _json(cases)


def _axis(latent: int, image: int, tile: int, stride: int, blend: int, **more: int) -> TiledAxis:
    sizes = {"longest_whole": tile, "samples": 2, "first_samples": 2, "dropped": 0, **more}
    return TiledAxis(
        latent_axis=latent, image_axis=image, tile=tile, stride=stride, blend=blend, **sizes
    )


_ROWS, _COLUMNS = _axis(1, 1, 4, 3, 2), _axis(2, 2, 3, 2, 2)
_TIME = _axis(1, 1, 4, 2, 3, first_samples=1, dropped=1)
_VIDEO_SPACE = (_axis(2, 2, 4, 3, 2), _axis(3, 3, 4, 3, 2))
TILE_CASES: tuple[tuple[str, Tiling, tuple[int, ...]], ...] = (
    ("rows and columns", Tiling(space=(_ROWS, _COLUMNS)), (1, 9, 7)),
    ("too short to divide", Tiling(space=(_ROWS, _COLUMNS)), (1, 4, 3)),
    ("time alone", Tiling(time=_TIME), (1, 7, 2, 1)),
    ("time, then space", Tiling(time=_TIME, space=_VIDEO_SPACE), (1, 6, 5, 5)),
)
"""Name, tiles, and the shape of a latent without channels."""


def tiles_text() -> str:
    """All of `tiles.json`: what the tiles of `repeated` blend to."""
    cases = []
    for seed, (name, tiling, shape) in enumerate(TILE_CASES):
        latent = philox_normal(seed, shape)
        chosen = levels(tiling, is_space_tiled=bool(tiling.space))
        image = decode_tiled(latent, chosen, repeated(chosen))
        cases.append(
            {
                "name": name,
                **msgspec.to_builtins(tiling),
                "latent_shape": shape,
                "latent": _digits(latent),
                "image_shape": image.shape,
                "image": _digits(image),
            }
        )
    return _json(cases)


def repeated(chosen: Sequence[Level]) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """A decoder whose samples have the value of their position, plus half of the tile's first."""

    def decode(tile: NDArray[np.float32]) -> NDArray[np.float32]:
        image = tile
        sizes = image_shape(tile.shape, tile.shape, chosen)
        for axis in itertools.chain(*chosen):
            samples = np.arange(sizes[axis.image_axis])
            positions = np.maximum(0, 1 + (samples - axis.first_samples) // axis.samples)
            image = np.take(image, positions, axis=axis.image_axis)
        return image + tile.ravel()[0] * np.float32(0.5)

    return decode


def _digits(values: NDArray[np.float32]) -> list[float]:
    """The values with nine digits, which give a float32 back exactly."""
    return [float(f"{value:.9g}") for value in values.ravel().tolist()]


def _json(cases: object) -> str:
    return json.dumps(cases, indent=None).replace("}, {", "},\n{") + "\n"


TEXTS: dict[str, Callable[[], str]] = {
    "noise.txt": noise_text,
    "grids.json": grids_text,
    "folds.json": folds_text,
    "tiles.json": tiles_text,
}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in TEXTS.items():
        (GOLDEN / name).write_text(text(), encoding="utf-8")
