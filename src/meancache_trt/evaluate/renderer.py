"""What makes the pictures that are compared, and the usual one: a bundle's engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from meancache_trt.bundle import Bundle
from meancache_trt.calibration.evaluation import Setup
from meancache_trt.calibration.trajectories import Prompt
from meancache_trt.conditioning import Conditioning
from meancache_trt.manifest import Resolution
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.noise import draw_noise
from meancache_trt.meancache.schedule import Schedule
from meancache_trt.meancache.sigmas import SigmaGrid
from meancache_trt.render import Pipeline
from meancache_trt.rendering import NoiseSource
from meancache_trt.session import Batch, Session

Render = Callable[[Sequence[Prompt]], Batch]
"""Pictures of prompts, at most a batch of them; each has its own seed's noise."""


class Renderer(Protocol):
    """A model that renders any schedule, always from the same noise for the same seed."""

    batch: int
    """Pictures at a time."""

    def grid(self, steps: int) -> SigmaGrid:
        """The model's own grid of so many steps."""

    def open(self, schedule: Schedule) -> Render:
        """Make ready to render with a schedule; raises where it does not belong to the model."""

    def setup(self, steps: int, reference_steps: int | None) -> Setup:
        """What an evaluation says of this renderer."""


class EngineRenderer:
    """A bundle on its engine, at one size and guidance scale, and at the full text length.

    Args:
        pipeline: must outlive the renderer.
        resolution: one of the bundle's.
        directory: where embeddings are kept, read when they are needed.
        guidance_scale: by default the model's.
        batch: pictures at a time; what one looks like does not depend on the others.
        noise: see `Pipeline.render`.
        threads: those that the pipeline was opened with, to be told.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        resolution: Resolution,
        directory: Path,
        *,
        guidance_scale: float | None = None,
        batch: int = 1,
        noise: NoiseSource = "philox",
        threads: int = 0,
    ) -> None:
        self._pipeline, self._resolution, self._directory = pipeline, resolution, directory
        self._guidance_scale = pipeline.guidance(guidance_scale)
        self.batch, self._noise, self._threads = batch, noise, threads

    def grid(self, steps: int) -> SigmaGrid:
        """See `Renderer`."""
        return self._pipeline.grid(steps, self._resolution)

    def open(self, schedule: Schedule) -> Render:
        """See `Renderer`; a batch that is not full has a session of its own."""
        checked = self._pipeline.schedule(schedule, self._guidance_scale, self._resolution)
        sessions: dict[int, Session] = {}

        def render(prompts: Sequence[Prompt]) -> Batch:
            size = len(prompts)
            if size not in sessions:
                graphs = self._pipeline.graphs
                sessions[size] = Session(graphs, checked, self._resolution, batch=size)
            tensors = self._conditioning([prompt.text for prompt in prompts]).tensors
            return sessions[size].run(self._start(prompts), tensors, self._guidance_scale)

        return render

    def setup(self, steps: int, reference_steps: int | None) -> Setup:
        """See `Renderer`."""
        bundle, runtime = self._pipeline.bundle, self._pipeline.runtime
        export = bundle.export
        return Setup(
            model=export.model.name,
            digest=export.model.digest,
            family=export.family,
            bundle_id=bundle.manifest.bundle_id,
            renderer=f"{runtime.name} {runtime.version}",
            threads=self._threads,
            batch=self.batch,
            height=self._resolution.height,
            width=self._resolution.width,
            frames=self._resolution.frames,
            frames_per_second=export.frames_per_second,
            steps=steps,
            reference_steps=reference_steps,
            guidance_scale=self._guidance_scale,
            precision=self._pipeline.graphs.network("transformer").precision,
            noise=self._noise,
        )

    def _start(self, prompts: Sequence[Prompt]) -> np.ndarray:
        shape = self._resolution.noise_shape
        return np.stack([draw_noise(self._noise, prompt.seed, shape) for prompt in prompts])

    def _conditioning(self, texts: Sequence[str]) -> Conditioning:
        """What the network is fed: the prompts, then under classic guidance the empty one of each.

        Kept in a file, since every schedule is rendered with it.
        """
        path = self._directory / f"{digest_of(repr(texts).encode())}.safetensors"
        if not path.exists():
            made = self._pipeline.encode(texts)
            if self._pipeline.bundle.export.guidance.is_classifier_free:
                made = made.followed_by(self._pipeline.encode([""] * len(texts)))
            made.save(path)
            return made
        return Conditioning.load(path)


def other_precisions(bundle: Bundle, own: str = "float32") -> list[str]:
    """The precisions of the bundle's transformer graphs besides `own`.

    Whether they run is for a runtime to say.
    """
    components = bundle.export.components
    names = [name for name in components if name.partition("/")[0] == "transformer"]
    return [components[name].precision for name in names if components[name].precision != own]
