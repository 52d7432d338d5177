"""Ranges of sizes to ranges of shapes: what a TensorRT optimisation profile is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from meancache_trt.export.family import Configs, Family, Size, check_size, resolved
from meancache_trt.manifest import Component, batch_symbols
from meancache_trt.shapes import Ranges

Shape = tuple[int, ...]


class ShapeRange(NamedTuple):
    """The smallest, the usual and the largest shape of a tensor; no axis descends."""

    min: Shape
    opt: Shape
    max: Shape


def profile(
    component: Component, family: Family, configs: Configs, ranges: Ranges
) -> dict[str, ShapeRange]:
    """The shapes that each input of a graph takes over `ranges`, by name.

    The smallest of all sizes are taken together, and so are the largest: 512x1024 and 1024x512 are
    covered by 512x512 to 1024x1024. Every symbol follows by the family's own rule, so that the
    inputs of one graph agree, and those of graphs that hand tensors on to each other.

    Raises `InputError` where an end of the ranges is a size that the family cannot take.
    """
    ends = list(_symbols(family, configs, ranges))
    return {
        name: ShapeRange(*(resolved(record, symbols) for symbols in ends))
        for name, record in component.inputs.items()
    }


def _symbols(family: Family, configs: Configs, ranges: Ranges) -> Iterator[dict[str, int]]:
    """Every symbol at the ranges' min, opt and max."""
    frames = (None,) * 3 if ranges.frames is None else ranges.frames.ends
    others = (ranges.batch, ranges.height, ranges.width, ranges.text_tokens)
    ends = zip(*(each.ends for each in others), frames, strict=True)
    for batch, height, width, text_tokens, count in ends:
        size = Size(height, width, text_tokens, count)
        check_size(family, configs, size)
        yield {**family.symbols(configs, size), **batch_symbols(batch)}
