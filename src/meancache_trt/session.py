"""A bundle made ready to render one schedule at one size and batch: buffers bound end to end.

    noise, conditioning ── prepare ──▶ latent, position tables
    latent ── loop: B x (transformer, update) ──▶ latent
    latent ── vae_decoder ──▶ pictures

Each graph reads what the one before wrote, where it wrote it; nothing passes through the host but
the tiles of a latent that is decoded in tiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.bundle import Bundle
from meancache_trt.decoder import Decoder
from meancache_trt.errors import RenderError, ScheduleError
from meancache_trt.manifest import Component, Resolution, TensorRecord, batch_symbols
from meancache_trt.meancache.loop import DenoisingLoop, Network, OnEvaluation
from meancache_trt.meancache.runtime import Call, Graph, Runtime, Tensor
from meancache_trt.meancache.schedule import Schedule
from meancache_trt.tiling import levels

WrapGraph = Callable[[Graph], Graph]
Guidance = float | NDArray[np.float32] | None


@dataclass(frozen=True)
class Batch:
    """What a session made: final latents (B, S, C), pictures (B, H, W, 3) in [0, 1], loop time."""

    latents: NDArray[np.float32]
    pictures: NDArray[np.float32]
    loop_ms: float


class Graphs:
    """The graphs of a bundle on one runtime, each loaded at its first use.

    `precision` is that of the transformer, None for what the runtime prefers.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, precision: str | None = None) -> None:
        self.bundle, self.runtime, self._precision = bundle, runtime, precision
        self._loaded: dict[str, Graph] = {}

    def network(self, part: str) -> Component:
        """A network in the precision that the runtime prefers of those that there are.

        Raises `BundleError` where the transformer is not there in the precision asked for.
        """
        precisions = self.runtime.precisions
        if self._precision is not None:
            others = () if part == "transformer" else precisions
            precisions = (self._precision, *others)
        return self.bundle.export.component_in(part, precisions)[1]

    def graph(self, component: Component) -> Graph:
        """The loaded graph of a component."""
        if component.path not in self._loaded:
            path = self.bundle.component_path(component)
            is_light = not component.weight_bytes
            self._loaded[component.path] = self.runtime.load(path, is_light=is_light)
        return self._loaded[component.path]

    def drop(self, component: Component) -> None:
        """Forget a graph; its memory goes with the last call that is bound to it."""
        self._loaded.pop(component.path, None)


class Session:
    """Render batches of one size with one schedule. Not thread-safe.

    Args:
        graphs: the bundle's graphs, on the runtime to use.
        schedule: already fitted to the bundle's grid.
        resolution: one of the bundle's.
        batch: pictures at a time.
        wrap_transformer: replaces the transformer graph, for measuring.
    """

    def __init__(
        self,
        graphs: Graphs,
        schedule: Schedule,
        resolution: Resolution,
        *,
        batch: int = 1,
        wrap_transformer: WrapGraph | None = None,
    ) -> None:
        export = graphs.bundle.export
        self._graphs = graphs
        self._sizes = {**resolution.symbols, **batch_symbols(batch)}
        self._prepare = export.components["prepare"]
        transformer, update = graphs.network("transformer"), self._update_for(schedule)
        scales = {
            n: record for n, record in update.inputs.items() if record.role == "guidance_scale"
        }
        self._records = {
            name: record
            for name, record in {**self._prepare.inputs, **transformer.inputs, **scales}.items()
            if record.role not in ("latent", "model_input", "timestep")
        }
        self._inputs = {name: self._tensor(record) for name, record in self._records.items()}
        is_guided = export.guidance.is_classifier_free
        graph = graphs.graph(transformer)
        self.loop = DenoisingLoop(
            graphs.runtime,
            Network(
                graph if wrap_transformer is None else wrap_transformer(graph),
                latent=transformer.input_named("model_input" if is_guided else "latent"),
                timestep=transformer.input_named("timestep"),
                output=transformer.output_named("velocity"),
                timestep_scale=export.timestep_scale,
            ),
            graphs.graph(update),
            schedule=schedule,
            latent_shape=(batch, *resolution.latent_shape),
            constants=self._constants(transformer),
            update_constants={name: self._inputs[name] for name in scales},
        )
        self._preparation = self._bind_prepare()
        self._latent = self.loop.final.view((batch, *resolution.decode_shape))
        self._decoders: dict[bool, Decoder] = {}

    def run(
        self,
        noise: NDArray[np.float32],
        conditioning: Mapping[str, NDArray[np.float32]],
        guidance_scale: Guidance,
        on_evaluation: OnEvaluation | None = None,
        *,
        vae_tiling: bool = False,
    ) -> Batch:
        """Render a batch.

        Args:
            noise: unpacked, (batch, *resolution.noise_shape), float32.
            conditioning: by transformer input name, batch first; under classifier-free guidance
                that of the prompts, then that of the negative prompts.
            guidance_scale: of all pictures, or of each (batch,); None where the model takes none.
            on_evaluation: see `DenoisingLoop.run`.
            vae_tiling: decode in tiles in space too, where the picture is larger than one.

        Raises:
            InputError: for `vae_tiling` where the bundle has no tiles in space.
            RenderError: where a shape does not fit, or the result is not finite.
        """
        decoder = self._decoder(vae_tiling=vae_tiling)
        self._write(noise, conditioning, guidance_scale)
        self._preparation.enqueue()
        self._graphs.runtime.synchronize()
        start = time.perf_counter()
        self.loop.run(on_evaluation)
        self._graphs.runtime.synchronize()
        loop_ms = 1e3 * (time.perf_counter() - start)
        latents = self.loop.result()
        return Batch(latents, _channels_last(decoder.run()), loop_ms)

    def evaluate(
        self,
        node: int,
        latents: NDArray[np.float32],
        conditioning: Mapping[str, NDArray[np.float32]],
        guidance_scale: Guidance,
    ) -> NDArray[np.float32]:
        """The velocities of a batch at the timestep of a node, after guidance.

        `latents` and the result are (batch, *resolution.latent_shape), float32; for the rest see
        `run`. Raises `RenderError` where a shape does not fit.
        """
        self._write(None, conditioning, guidance_scale)
        self._preparation.enqueue()  # position tables; its latent is replaced
        self._graphs.runtime.synchronize()
        return self.loop.evaluate(node, latents)

    def decode(
        self, latents: NDArray[np.float32], *, vae_tiling: bool = False
    ) -> NDArray[np.float32]:
        """Pictures of final latents (batch, *resolution.latent_shape), float32; see `run`."""
        self.loop.final.write(latents)
        return _channels_last(self._decoder(vae_tiling=vae_tiling).run())

    def _write(
        self,
        noise: NDArray[np.float32] | None,
        conditioning: Mapping[str, NDArray[np.float32]],
        guidance_scale: Guidance,
    ) -> None:
        for name, tensor in self._inputs.items():
            match self._records[name].role:
                case "noise" if noise is not None:
                    tensor.write(noise)
                case "guidance_scale":
                    scales = np.asarray(guidance_scale, tensor.dtype)
                    tensor.write(np.ascontiguousarray(np.broadcast_to(scales, tensor.shape)))
                case "conditioning" | "text_mask":
                    tensor.write(_named(conditioning, name))

    def _shape(self, record: TensorRecord) -> list[int]:
        return [self._sizes[d] if isinstance(d, str) else d for d in record.shape]

    def _tensor(self, record: TensorRecord) -> Tensor:
        return self._graphs.runtime.zeros(self._shape(record), record.dtype)

    def _constants(self, transformer: Component) -> dict[str, Tensor]:
        return {name: self._inputs[name] for name in transformer.inputs if name in self._inputs}

    def _update_for(self, schedule: Schedule) -> Component:
        try:
            return self._graphs.bundle.export.update_for(schedule.history)
        except KeyError:
            raise ScheduleError(
                f"schedule {schedule.name!r} reads {schedule.history} velocities back, more than "
                "any update graph of the bundle holds; use shorter spans or fewer nodes in a row"
            ) from None

    def _bind_prepare(self) -> Call:
        inputs = {name: self._inputs[name] for name in self._prepare.inputs}
        starts = {"latent": self.loop.initial, "model_input": self.loop.initial_input}
        outputs = {
            name: starts[record.role] if record.role in starts else self._inputs[name]
            for name, record in self._prepare.outputs.items()
        }
        return self._graphs.graph(self._prepare).bind({**inputs, **outputs})

    def _decoder(self, *, vae_tiling: bool) -> Decoder:
        """The decoder of one way to decode; made once, then kept."""
        if vae_tiling not in self._decoders:
            export = self._graphs.bundle.export
            decoder = self._graphs.network("vae_decoder")
            self._decoders[vae_tiling] = Decoder(
                self._graphs.runtime,
                self._graphs.graph(decoder),
                decoder,
                latent=self._latent,
                image_shape=self._shape(decoder.outputs[decoder.output_named("image")]),
                levels=levels(export.tiling, is_space_tiled=vae_tiling),
            )
        return self._decoders[vae_tiling]


def _channels_last(images: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.moveaxis(images, 1, -1))


def _named(conditioning: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in conditioning:
        raise RenderError(
            f"the conditioning lacks {name!r}, found {sorted(conditioning)}; encode prompts with "
            "this bundle"
        )
    return conditioning[name]
