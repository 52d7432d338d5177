"""The VAE decoder, bound to where the loop leaves its latent; in tiles where it is too large."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meancache_trt.graphs import Graphs
from meancache_trt.manifest import Component, Resolution, batch_symbols
from meancache_trt.meancache.runtime import Call, Graph, Runtime, Tensor
from meancache_trt.tiling import Array, Level, decode_tiled, image_shape, is_divided, levels


class PictureDecoder:
    """Latents of one size and batch to pictures, whole or in tiles, each made ready at first use.

    Args:
        graphs: the bundle's, on the runtime to use.
        resolution: one of the bundle's.
        batch: pictures at a time.
        latent: float32 (batch, *resolution.latent_shape), read where it lies; by default the
            decoder has one of its own.
    """

    def __init__(
        self, graphs: Graphs, resolution: Resolution, batch: int, *, latent: Tensor | None = None
    ) -> None:
        self._graphs = graphs
        self._sizes = {**resolution.symbols, **batch_symbols(batch)}
        shape = (batch, *resolution.latent_shape)
        self._latent = graphs.runtime.zeros(shape, "float32") if latent is None else latent
        self._grid = self._latent.view((batch, *resolution.decode_shape))
        self._decoders: dict[bool, Decoder] = {}

    def run(self, latents: Array | None = None, *, vae_tiling: bool = False) -> Array:
        """Pictures (batch, H, W, 3), of videos (batch, frames, H, W, 3), float32 in [0, 1].

        Of `latents`, float32 (batch, *resolution.latent_shape), or of what the tensor holds.
        Raises `InputError` for `vae_tiling` where the bundle has no tiles in space.
        """
        decoder = self.prepare(vae_tiling=vae_tiling)
        if latents is not None:
            with self._graphs.runtime.turn():
                self._latent.write(latents)
        return np.ascontiguousarray(np.moveaxis(decoder.run(), 1, -1))

    def prepare(self, *, vae_tiling: bool) -> Decoder:
        """The decoder of one way to decode; made once, then kept. Raises as `run` does."""
        if vae_tiling not in self._decoders:
            with self._graphs.runtime.turn():
                self._decoders[vae_tiling] = self._made(vae_tiling=vae_tiling)
        return self._decoders[vae_tiling]

    def _made(self, *, vae_tiling: bool) -> Decoder:
        component = self._graphs.network("vae_decoder")
        image = component.outputs[component.output_named("image")]
        return Decoder(
            self._graphs.runtime,
            self._graphs.graph(component),
            component,
            latent=self._grid,
            image_shape=image.resolved(self._sizes),
            levels=levels(self._graphs.bundle.export.tiling, is_space_tiled=vae_tiling),
        )


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
            with self._runtime.turn():
                latent = self._latent.read()
            images = decode_tiled(latent, self._levels, self._decode)
        else:
            images = self._read(*self._whole)
        # Only now: diffusers blends what overshoots.
        return np.clip(images, 0, 1, out=images)

    def _decode(self, tile: Array) -> Array:
        with self._runtime.turn():
            if tile.shape not in self._tiles:
                buffer = self._runtime.zeros(tile.shape, self._latent.dtype)
                self._tiles[tile.shape] = (buffer, *self._bind(buffer))
            latent, image, call = self._tiles[tile.shape]
            latent.write(np.ascontiguousarray(tile))
        return self._read(image, call)

    def _read(self, image: Tensor, call: Call) -> Array:
        """Run a call and read what it made; others may take their turn while it runs."""
        with self._runtime.turn():
            call.enqueue()
        self._runtime.synchronize()
        with self._runtime.turn():
            return image.read()

    def _bind(self, latent: Tensor) -> tuple[Tensor, Call]:
        given, made = (
            self._component.input_named("latent_grid"),
            self._component.output_named("image"),
        )
        shape = image_shape(latent.shape, self._image_shape, self._levels)
        image = self._runtime.zeros(shape, self._component.outputs[made].dtype)
        return image, self._graph.bind({given: latent, made: image})
