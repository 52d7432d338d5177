"""A bundle made ready to render one schedule at one size and batch: buffers bound end to end.

    noise, conditioning ── prepare ──▶ latent, position tables
    latent ── loop: B x (transformer or transformer_2, update) ──▶ latent
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

from meancache_trt.decoder import PictureDecoder
from meancache_trt.errors import RenderError, ScheduleError
from meancache_trt.graphs import Graphs
from meancache_trt.manifest import Component, Exported, Resolution, TensorRecord, batch_symbols
from meancache_trt.meancache.loop import DenoisingLoop, Network, OnEvaluation, check_finite
from meancache_trt.meancache.runtime import Call, Graph, Tensor
from meancache_trt.meancache.schedule import TRANSFORMERS, Schedule

WrapGraph = Callable[[Graph], Graph]
Guidance = float | NDArray[np.float32] | None


@dataclass(frozen=True)
class Denoised:
    """What a loop made: final latents (B, S, C), which may be not finite, and its time."""

    latents: NDArray[np.float32]
    loop_ms: float


@dataclass(frozen=True)
class Batch:
    """What a session made: final latents (B, S, C), pictures (B, H, W, 3) in [0, 1], loop time."""

    latents: NDArray[np.float32]
    pictures: NDArray[np.float32]
    loop_ms: float


class Session:
    """Render batches of one size with one schedule. Not thread-safe.

    Args:
        graphs: the bundle's graphs, on the runtime to use.
        schedule: already fitted to the bundle's grid.
        resolution: one of the bundle's.
        batch: pictures at a time.
        wrap_transformer: replaces each transformer graph that the schedule names, for measuring.

    Raises:
        ScheduleError: where the schedule is not fitted to the bundle's second stage, or reads more
            history than an update graph holds.
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
        _check_stages(schedule, export)
        transformer, update = graphs.network("transformer"), self._update_for(schedule)
        self._scales = {
            n: record for n, record in update.inputs.items() if record.role == "guidance_scale"
        }
        self._records = {
            name: record
            for name, record in {
                **self._prepare.inputs,
                **transformer.inputs,
                **self._scales,
            }.items()
            if record.role not in ("latent", "model_input", "timestep")
        }
        self._inputs = {name: self._tensor(record) for name, record in self._records.items()}
        self.loop = DenoisingLoop(
            graphs.runtime,
            {
                part: self._network(part, wrap_transformer)
                for part in dict.fromkeys(schedule.transformers())
            },
            graphs.graph(update),
            schedule=schedule,
            latent_shape=(batch, *resolution.latent_shape),
            constants=self._constants(transformer),
        )
        self._preparation = self._bind_prepare()
        self._decoder = PictureDecoder(graphs, resolution, batch, latent=self.loop.final)

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
                A second stage with a scale of its own has that one.
            on_evaluation: see `DenoisingLoop.run`.
            vae_tiling: decode in tiles in space too, where the picture is larger than one.

        Raises:
            InputError: for `vae_tiling` where the bundle has no tiles in space.
            RenderError: where a shape does not fit, or the result is not finite.
        """
        self._decoder.prepare(vae_tiling=vae_tiling)  # refused before the network runs
        denoised = self.denoise(noise, conditioning, guidance_scale, on_evaluation)
        check_finite(denoised.latents)
        pictures = self._decoder.run(vae_tiling=vae_tiling)
        return Batch(denoised.latents, pictures, denoised.loop_ms)

    def denoise(
        self,
        noise: NDArray[np.float32],
        conditioning: Mapping[str, NDArray[np.float32]],
        guidance_scale: Guidance,
        on_evaluation: OnEvaluation | None = None,
    ) -> Denoised:
        """The loop alone; see `run`. One thread may denoise while others use other sessions."""
        runtime = self._graphs.runtime
        with runtime.turn():
            self._write(noise, conditioning, guidance_scale)
            self._preparation.enqueue()
        runtime.synchronize()
        start = time.perf_counter()
        self.loop.run(on_evaluation)
        runtime.synchronize()
        loop_ms = 1e3 * (time.perf_counter() - start)
        with runtime.turn():
            return Denoised(self.loop.final.read(), loop_ms)

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
        return self._decoder.run(latents, vae_tiling=vae_tiling)

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

    def _network(self, part: str, wrap: WrapGraph | None) -> Network:
        export, component = self._graphs.bundle.export, self._graphs.network(part)
        graph = self._graphs.graph(component)
        is_guided = export.guidance.is_classifier_free
        return Network(
            graph if wrap is None else wrap(graph),
            latent=component.input_named("model_input" if is_guided else "latent"),
            timestep=component.input_named("timestep"),
            output=component.output_named("velocity"),
            timestep_scale=export.timestep_scale,
            update_constants={name: self._scale(part, name) for name in self._scales},
        )

    def _scale(self, part: str, name: str) -> Tensor:
        """What a network is guided by: the pictures' scale, or the second stage's own."""
        own = self._graphs.bundle.export.second_guidance_scale
        if part == TRANSFORMERS[0] or own is None:
            return self._inputs[name]
        record = self._scales[name]
        return self._graphs.runtime.tensor(np.full(self._shape(record), own, record.dtype))

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


def _check_stages(schedule: Schedule, export: Exported) -> None:
    found, expected = schedule.grid.second_stage, export.second_stage
    if found != expected:
        raise ScheduleError(
            f"expected a schedule with the bundle's second stage, {expected}, found {found} in "
            f"{schedule.name!r}; fit it to the bundle's grid first"
        )


def _named(conditioning: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in conditioning:
        raise RenderError(
            f"the conditioning lacks {name!r}, found {sorted(conditioning)}; encode prompts with "
            "this bundle"
        )
    return conditioning[name]
