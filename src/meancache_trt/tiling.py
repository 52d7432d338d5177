"""Decode in overlapping tiles that are blended, as diffusers' autoencoders do.

A latent is cut along some axes, every tile is decoded by itself, and each decoded tile fades in
over the end of the one before. All that is particular to a model is in a `Tiling` record. Blending
is float32 and, given the same decoded tiles, has the bits of diffusers' `blend_t`, `blend_v` and
`blend_h`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import InputError
from meancache_trt.manifest import TiledAxis, Tiling

Array = NDArray[np.float32]
Decode = Callable[[Array], Array]
Level = tuple[TiledAxis, ...]
"""Axes that are tiled together, the outer one first."""


@dataclass(frozen=True)
class Piece:
    """A tile along one axis.

    `latent` is what it reads; of what that decodes to, the first `dropped` samples are left out and
    the next ones are `image` of the image.
    """

    latent: slice
    dropped: int
    image: slice


def levels(tiling: Tiling | None, *, is_space_tiled: bool) -> tuple[Level, ...]:
    """The axes to tile, outermost level first: in time, then in space where that is asked for.

    Raises `InputError` where it is asked for and the decoder is not tiled in space.
    """
    tiling = tiling or Tiling()
    if is_space_tiled and not tiling.space:
        raise InputError(
            "VAE tiling was asked for, but this bundle says of no tiles in which its VAE would "
            "decode as diffusers' does; render without it"
        )
    time = () if tiling.time is None else ((tiling.time,),)
    return (*time, tiling.space) if is_space_tiled else time


def is_divided(shape: Sequence[int], chosen: Sequence[Level]) -> bool:
    """Whether a latent of this shape is too long along any axis of any level."""
    axes = itertools.chain(*chosen)
    return any(shape[axis.latent_axis] > axis.longest_whole for axis in axes)


def sample_count(axis: TiledAxis, positions: int) -> int:
    """Pixels or frames that so many latent positions decode to."""
    return axis.first_samples + (positions - 1) * axis.samples


def image_shape(
    latent: Sequence[int], image: Sequence[int], chosen: Sequence[Level]
) -> tuple[int, ...]:
    """`image`, the whole latent's, with the extents that a tile of shape `latent` has."""
    shape = list(image)
    for axis in itertools.chain(*chosen):
        shape[axis.image_axis] = sample_count(axis, latent[axis.latent_axis])
    return tuple(shape)


def pieces(axis: TiledAxis, positions: int) -> list[Piece]:
    """The tiles along an axis, in order. Their image slices are adjacent and cover it.

    A last tile of which nothing would be left, because all of it is dropped, is not among them;
    diffusers decodes it for nothing.
    """
    found = []
    for start in range(0, positions, axis.stride):
        stop = min(start + axis.tile, positions)
        dropped = axis.dropped if start else 0
        begin = start * axis.samples + dropped
        count = sample_count(axis, stop - start) - dropped
        kept = axis.stride * axis.samples + axis.dropped - dropped
        if count > 0:
            image = slice(begin, begin + min(count, kept))
            found.append(Piece(slice(start, stop), dropped, image))
    return found


def decode_tiled(latent: Array, chosen: Sequence[Level], decode: Decode) -> Array:
    """Decode a latent, tiled at every level at which it is too long.

    Args:
        latent: the latent grid, batch first.
        chosen: from `levels`.
        decode: the decoder. It gets parts of `latent` that need not be contiguous, and returns a
            new float32 array, which is then written to.
    """
    if not chosen:
        return decode(latent)
    level, *inner = chosen
    if not is_divided(latent.shape, [level]):
        return decode_tiled(latent, inner, decode)
    return _blended(latent, level, lambda tile: decode_tiled(tile, inner, decode))


def blend(before: Array, tile: Array, axis: TiledAxis) -> None:
    """Let `tile` fade in, in place, over the end of `before`: its first sample is all `before`.

    diffusers' `blend_t`, `blend_v` and `blend_h`, also where either is shorter than the blend.
    """
    along = axis.image_axis
    extent = min(before.shape[along], tile.shape[along], axis.blend)
    if not extent:
        return
    shares = (np.arange(extent) / extent).reshape(-1, *[1] * (tile.ndim - 1 - along))
    end = before[_at([along], [slice(before.shape[along] - extent, None)])]
    head = tile[_at([along], [slice(extent)])]
    # Each share is rounded to float32 before it multiplies, as torch does with a Python number.
    head[...] = end * (1 - shares).astype(head.dtype) + head * shares.astype(head.dtype)


def _blended(latent: Array, level: Level, decode: Decode) -> Array:
    """The tiles of one level, blended and side by side.

    A tile fades in over those before it along each axis in turn, which have already done so with
    theirs. The order counts: where four tiles meet, diffusers' shares are not products of those
    along the axes.
    """
    latent_axes = [axis.latent_axis for axis in level]
    image_axes = [axis.image_axis for axis in level]
    plans = [pieces(axis, latent.shape[axis.latent_axis]) for axis in level]
    waiting: dict[tuple[int, ...], Array] = {}  # tiles over which later ones fade in
    image: Array | None = None
    for index in itertools.product(*(range(len(plan)) for plan in plans)):
        parts = [plan[number] for plan, number in zip(plans, index, strict=True)]
        decoded = decode(latent[_at(latent_axes, [part.latent for part in parts])])
        tile = decoded[_at(image_axes, [slice(part.dropped, None) for part in parts])]
        _fade_in(tile, index, level, waiting)
        waiting[index] = tile
        if image is None:
            ends = {axis: plan[-1].image.stop for axis, plan in zip(image_axes, plans, strict=True)}
            shape = [ends.get(axis, extent) for axis, extent in enumerate(tile.shape)]
            image = np.empty(shape, tile.dtype)
        target = image[_at(image_axes, [part.image for part in parts])]
        target[...] = tile[tuple(slice(extent) for extent in target.shape)]
    assert image is not None  # no axis is without pieces
    return image


def _fade_in(
    tile: Array, index: tuple[int, ...], level: Level, waiting: dict[tuple[int, ...], Array]
) -> None:
    for place, axis in enumerate(level):
        if index[place]:
            before = (*index[:place], index[place] - 1, *index[place + 1 :])
            # Nothing else needs the one before along the outer axis: memory stays bounded.
            blend(waiting[before] if place else waiting.pop(before), tile, axis)


def _at(axes: Sequence[int], parts: Sequence[slice]) -> tuple[slice, ...]:
    """The index that takes a part of each of some axes, and all of the others."""
    chosen = dict(zip(axes, parts, strict=True))
    return tuple(chosen.get(axis, slice(None)) for axis in range(max(axes) + 1))
