"""A bundle's engine as the velocity field that fitted schedules are calibrated with."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from meancache_trt.calibration.trajectories import Array, Prompt, Trajectories
from meancache_trt.calibration.velocity_field import BATCH_VALUES, batch_of
from meancache_trt.conditioning import Conditioning, joined, paired
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.render import Pipeline
from meancache_trt.session import Session


class EngineField:
    """The network of a bundle at one size and guidance scale; see `VelocityField`.

    It takes text at its full length, so that prompts of any lengths share a batch.

    Args:
        pipeline: must outlive the field.
        trajectories: their settings are what the network is run with.
        directory: where each distinct prompt's embedding is kept, read when it is needed.
        batch: samples at a time, by default as many as `batch_of` says.

    Raises:
        MeanCacheError: where the trajectories belong to another model, size, grid, guidance scale,
            text length than the bundle's, or were recorded in a precision too far from its own.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        trajectories: Trajectories,
        directory: Path,
        *,
        batch: int | None = None,
    ) -> None:
        grid = trajectories.grid
        self._pipeline, self._directory = pipeline, directory
        self._resolution = pipeline.resolution(grid.height, grid.width, grid.frames)
        size = math.prod(self._resolution.latent_shape)
        self.batch = batch or batch_of(size, len(trajectories))
        _check_text(pipeline, trajectories)
        self._settings = settings = trajectories.settings
        lowest = settings.guidance_range[0] if settings.guidance_range else settings.guidance_scale
        self._schedule = pipeline.schedule(_all_steps(trajectories), lowest, self._resolution)
        self._sessions: dict[int, Session] = {}
        tiling = pipeline.bundle.export.tiling
        self._is_tiled = bool(tiling and tiling.space) and size > BATCH_VALUES

    def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:
        """See `VelocityField`. A batch that is not full is filled up with its last sample."""
        session, chosen = self._session(len(prompts))
        filled = [prompts[index] for index in chosen]
        conditionings = [self._conditioning(prompt.text).tensors for prompt in filled]
        velocities = session.evaluate(
            step,
            self._shaped(latents[chosen]),
            joined(conditionings),
            self._guidance(filled),
        )
        return velocities[: len(prompts)].reshape(len(prompts), -1)

    def pictures(self, latents: Array) -> Array:
        """See `VelocityField`."""
        session, chosen = self._session(len(latents))
        shaped = self._shaped(latents[chosen])
        return session.decode(shaped, vae_tiling=self._is_tiled)[: len(latents)]

    def _session(self, count: int) -> tuple[Session, list[int]]:
        """A session for one sample or for a full batch, and which samples fill it."""
        size = 1 if count == 1 else self.batch
        if size not in self._sessions:
            self._sessions[size] = Session(
                self._pipeline.graphs, self._schedule, self._resolution, batch=size
            )
        return self._sessions[size], [*range(count), *[count - 1] * (size - count)]

    def _guidance(self, prompts: Sequence[Prompt]) -> Array | None:
        """The scale of each prompt, or None where the model takes none."""
        scales = [self._pipeline.guidance(self._settings.guidance_of(p)) for p in prompts]
        return None if None in scales else np.array(scales, np.float32)

    def _shaped(self, latents: Array) -> Array:
        return latents.reshape(len(latents), *self._resolution.latent_shape)

    def _conditioning(self, text: str) -> Conditioning:
        """What the network is fed for a text, and for the empty one where guidance is classic."""
        path = self._directory / f"{digest_of(text.encode())}.safetensors"
        if not path.exists():
            made = self._pipeline.encode([text])
            if self._pipeline.bundle.export.guidance.is_classifier_free:
                (made,) = paired(made, self._pipeline.encode([""]))
            made.save(path)
        return Conditioning.load(path)


@contextlib.contextmanager
def engine_field(
    pipeline: Pipeline, trajectories: Trajectories, *, batch: int | None = None
) -> Iterator[EngineField]:
    """An `EngineField` whose embeddings are gone at the end of the `with`."""
    with tempfile.TemporaryDirectory() as directory:
        yield EngineField(pipeline, trajectories, Path(directory), batch=batch)


def _all_steps(trajectories: Trajectories) -> Schedule:
    """Every step, tied to the settings, so that the bundle refuses what does not belong to it."""
    settings = trajectories.settings
    return bake(
        "euler",
        settings.grid,
        range(settings.grid.steps),
        family=settings.family,
        model=settings.model,
        guidance_scale=settings.guidance_scale,
        guidance_range=settings.guidance_range,
        precision=settings.precision,
        name="the recording",
        calibration=Evidence(samples=len(trajectories), seconds=trajectories.seconds),
    )


def _check_text(pipeline: Pipeline, trajectories: Trajectories) -> None:
    own, recorded = pipeline.bundle.export.text_tokens, trajectories.settings.text_tokens
    if recorded not in (None, own):
        raise CalibrationError(
            f"the trajectories were recorded with {recorded} text tokens, this bundle takes {own}; "
            f"record with --text-tokens {own}"
        )
