"""The VAE decoder, bound to where the loop leaves its latent; in tiles where it is too large."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meancache_trt.manifest import Component
from meancache_trt.meancache.runtime import Call, Graph, Runtime, Tensor
from meancache_trt.tiling import Array, Level, decode_tiled, image_shape, is_divided


class Decoder:
    """The decoder graph for one size and batch.

    A whole latent is read where it lies. Tiles pass through the host, and their buffers are made
    once for each shape that a tile has.

    Args:
        runtime: where the graph was loaded.
        graph: the decoder's.
        component: its record.
        latent: the latent to decode, in the shape that the graph takes.
        image_shape: what all of it decodes to.
        levels: from `tiling.levels`.
    """

    def __init__(
        self,
        runtime: Runtime,
        graph: Graph,
        component: Component,
        *,
        latent: Tensor,
        image_shape: Sequence[int],
        levels: Sequence[Level],
    ) -> None:
        self._runtime, self._graph, self._component = runtime, graph, component
        self._latent, self._image_shape, self._levels = latent, image_shape, levels
        self._tiles: dict[tuple[int, ...], tuple[Tensor, Tensor, Call]] = {}
        is_tiled = is_divided(latent.shape, levels)
        self._whole = None if is_tiled else self._bind(latent)

    def run(self) -> Array:
        """The images, (B, 3, H, W) or (B, 3, frames, H, W) float32 in [0, 1]."""
        if self._whole is None:
            images = decode_tiled(self._latent.read(), self._levels, self._decode)
        else:
            image, call = self._whole
            call.enqueue()
            images = image.read()
        # Only now: diffusers blends what overshoots.
        return np.clip(images, 0, 1, out=images)

    def _decode(self, tile: Array) -> Array:
        if tile.shape not in self._tiles:
            buffer = self._runtime.zeros(tile.shape, self._latent.dtype)
            self._tiles[tile.shape] = (buffer, *self._bind(buffer))
        latent, image, call = self._tiles[tile.shape]
        latent.write(np.ascontiguousarray(tile))
        call.enqueue()
        return image.read()

    def _bind(self, latent: Tensor) -> tuple[Tensor, Call]:
        given, made = (
            self._component.input_named("latent_grid"),
            self._component.output_named("image"),
        )
        shape = image_shape(latent.shape, self._image_shape, self._levels)
        image = self._runtime.zeros(shape, self._component.outputs[made].dtype)
        return image, self._graph.bind({given: latent, made: image})
