"""A sampler whose velocity is known in closed form, and trajectories recorded from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meancache_trt.calibration.trajectories import (
    Array,
    OnStep,
    Prompt,
    Settings,
    Trajectories,
    record,
)
from meancache_trt.meancache.sigmas import SigmaGrid, make_grid

SHAPE = (2, 12)


@dataclass
class FieldSampler:
    """Euler on dx/dσ = sin(ωσ + φ)·x, elementwise, with ω and φ drawn from the seed."""

    grid: SigmaGrid
    calls: list[Prompt] = field(default_factory=list)

    def __call__(self, prompt: Prompt, on_step: OnStep) -> tuple[Array, Array]:
        self.calls.append(prompt)
        omega, phase, initial = drawn(prompt)
        sigmas, latent = self.grid.array(), initial
        for step in range(self.grid.steps):
            velocity = np.sin(omega * sigmas[step] + phase) * latent
            on_step(step, velocity.astype(np.float32))
            latent = latent + (sigmas[step + 1] - sigmas[step]) * velocity
        return initial.astype(np.float32), latent.astype(np.float32)


def drawn(prompt: Prompt) -> tuple[NDArray[np.float64], ...]:
    """ω, φ and the noise of a prompt, each of `SHAPE`."""
    rng = np.random.default_rng([prompt.seed, len(prompt.text)])
    return rng.uniform(1, 5, SHAPE), rng.uniform(0, 6, SHAPE), rng.standard_normal(SHAPE)


@dataclass
class FormulaField:
    """The velocity of `FieldSampler` anywhere, as a `VelocityField`; counts its evaluations."""

    grid: SigmaGrid
    batch: int = 2
    evaluations: int = 0

    def pictures(self, latents: Array) -> Array:
        """A tile for each value, gray where it is 0: as large as SSIM's window takes."""
        assert len(latents) <= self.batch
        tiles = 1 / (1 + np.exp(-latents.reshape(-1, *SHAPE)))
        return tiles.repeat(6, axis=1).repeat(2, axis=2)[..., None].astype(np.float32)

    def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:
        assert len(prompts) == len(latents) <= self.batch
        self.evaluations += len(prompts)
        sigma = self.grid.array()[step]
        velocities = np.zeros_like(latents)
        for velocity, prompt, latent in zip(velocities, prompts, latents, strict=True):
            omega, phase, _ = drawn(prompt)
            velocity[:] = np.sin(omega * sigma + phase).reshape(-1) * latent
        return velocities


@pytest.fixture
def network(grid: SigmaGrid) -> FormulaField:
    return FormulaField(grid)


@pytest.fixture
def samples(tmp_path: Path, settings: Settings, sampler: FieldSampler) -> Trajectories:
    """Enough of them to hold some out."""
    prompts = [Prompt("a ring", seed) for seed in range(6)]
    return record(tmp_path / "samples", settings, sampler, prompts)


@pytest.fixture
def grid() -> SigmaGrid:
    return make_grid(12, shift=3.0)


@pytest.fixture
def settings(grid: SigmaGrid) -> Settings:
    return Settings(grid=grid, guidance_scale=3.5, family="flux")


@pytest.fixture
def sampler(grid: SigmaGrid) -> FieldSampler:
    return FieldSampler(grid)


@pytest.fixture
def prompts() -> list[Prompt]:
    return [Prompt("a ring", 0), Prompt("a ring", 1), Prompt("a large star", 0)]


@pytest.fixture
def trajectories(
    tmp_path: Path, settings: Settings, sampler: FieldSampler, prompts: list[Prompt]
) -> Trajectories:
    return record(tmp_path / "trajectories", settings, sampler, prompts)


@pytest.fixture
def make_sampler(grid: SigmaGrid) -> Callable[..., Any]:
    """A sampler that passes each (step, velocity) through `edit` before it is reported."""

    def make(edit: Callable[[int, Array], Array]) -> Callable[..., Any]:
        def sample(prompt: Prompt, on_step: OnStep) -> tuple[Array, Array]:
            def edited(step: int, velocity: Array) -> None:
                on_step(step, edit(step, velocity))

            return FieldSampler(grid)(prompt, edited)

        return sample

    return make
