"""Write the golden vectors in tests/golden, which the Python and the C++ tests read.

Run it only where the generator is changed on purpose: every seed then gives another picture.
"""

from __future__ import annotations

from pathlib import Path

from meancache_trt.meancache.noise import philox_normal

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


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "noise.txt").write_text(noise_text(), encoding="utf-8")
