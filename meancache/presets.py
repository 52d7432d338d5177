"""Schedules that the MeanCache authors published, by name, with the grids that they belong to.

The data and its licence are in `published_schedules.json`. A name is model:budget, such as
"Qwen/Qwen-Image:10".
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import msgspec

from meancache_trt.errors import InputError, ScheduleError
from meancache_trt.meancache.schedule import ModelReference, Schedule, bake
from meancache_trt.meancache.sigmas import Convention, SigmaGrid, grid_from_config

DATA = "published_schedules.json"


class _Edges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    nodes: tuple[int, ...]
    spans: tuple[int, ...]


class _Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`scheduler` is in the words of diffusers' scheduler_config.json; sizes are in pixels.

    `multiple` is the side of the square that becomes one token.
    """

    family: str
    steps: int
    convention: Convention
    sigma_min: float | None
    height: int
    width: int
    multiple: int
    scheduler: dict[str, Any]
    schedules: dict[str, _Edges]


class _Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    _about: str
    models: dict[str, _Model]


def preset_names() -> tuple[str, ...]:
    """Every name that `preset` knows, by model and falling budget."""
    return tuple(
        f"{name}:{budget}" for name, model in _models().items() for budget in model.schedules
    )


def preset(name: str, *, height: int | None = None, width: int | None = None) -> Schedule:
    """Bake a published schedule for a picture size, by default the model's own.

    Args:
        name: one of `preset_names()`.
        height: in pixels; where the model shifts by resolution, the grid depends on it.
        width: in pixels, likewise.

    Raises:
        ScheduleError: where no preset has that name.
        InputError: where a side is not a positive multiple of what one token covers.
    """
    if name not in preset_names():
        raise ScheduleError(
            f"no preset is called {name!r}; expected one of {', '.join(preset_names())}"
        )
    model_name, _, budget = name.rpartition(":")
    model = _models()[model_name]
    edges = model.schedules[budget]
    return bake(
        "official",
        _grid(
            model,
            model.height if height is None else height,
            model.width if width is None else width,
        ),
        edges.nodes,
        edges.spans,
        name=f"{model_name.rpartition('/')[2]}-b{len(edges.nodes)}",
        family=model.family,
        model=ModelReference(name=model_name),
    )


def _grid(model: _Model, height: int, width: int) -> SigmaGrid:
    rows, columns = (
        _tokens(side, pixels, model.multiple)
        for side, pixels in (("height", height), ("width", width))
    )
    return grid_from_config(
        model.scheduler,
        model.steps,
        convention=model.convention,
        image_tokens=rows * columns,
        height=height,
        width=width,
        sigma_min=model.sigma_min,
    )


def _tokens(side: str, pixels: int, multiple: int) -> int:
    if pixels < multiple or pixels % multiple:
        nearest = max(round(pixels / multiple), 1) * multiple
        raise InputError(
            f"{side} is a multiple of {multiple} pixels for this model, found {pixels}; the "
            f"nearest is {nearest}"
        )
    return pixels // multiple


@functools.cache
def _models() -> dict[str, _Model]:
    text = resources.files("meancache_trt.meancache").joinpath(DATA).read_bytes()
    return msgspec.json.decode(text, type=_Published).models
