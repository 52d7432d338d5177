"""Ranges of sizes to ranges of shapes: what a TensorRT optimisation profile is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from meancache_trt.export.family import Configs, Family, Size, check_size
from meancache_trt.manifest import Component, Tiling, batch_symbols
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
    inputs of one graph agree, and those of graphs that hand tensors on to each other. A latent that
    is decoded in tiles is as long as a tile at most, where it is always tiled, and as short as one
    position, which a last tile may be.

    Raises `InputError` where an end of the ranges is a size that the family cannot take.
    """
    ends = list(_symbols(family, configs, ranges))
    tiling = family.tiling(configs) if family.tiling else Tiling()
    shapes = {}
    for name, record in component.inputs.items():
        whole = ShapeRange(*(record.resolved(symbols) for symbols in ends))
        shapes[name] = _tiled(whole, tiling) if record.role == "latent_grid" else whole
    return shapes


def _tiled(whole: ShapeRange, tiling: Tiling) -> ShapeRange:
    smallest, usual, largest = (list(shape) for shape in whole)
    for axis in (*([tiling.time] if tiling.time else []), *tiling.space):
        place = axis.latent_axis
        if largest[place] > axis.longest_whole:
            smallest[place] = 1
            if axis == tiling.time:
                usual[place] = min(usual[place], axis.tile)
                largest[place] = axis.tile
    return ShapeRange(tuple(smallest), tuple(usual), tuple(largest))


def _symbols(family: Family, configs: Configs, ranges: Ranges) -> Iterator[dict[str, int]]:
    """Every symbol at the ranges' min, opt and max."""
    frames = (None,) * 3 if ranges.frames is None else ranges.frames.ends
    others = (ranges.batch, ranges.height, ranges.width, ranges.text_tokens)
    ends = zip(*(each.ends for each in others), frames, strict=True)
    for batch, height, width, text_tokens, count in ends:
        size = Size(height, width, text_tokens, count)
        check_size(family, configs, size)
        yield {**family.symbols(configs, size), **batch_symbols(batch)}
