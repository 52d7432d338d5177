"""What a fit along a method's own trajectories asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from meancache_trt.calibration.trajectories import Array, Prompt


class VelocityField(Protocol):
    """The velocity that a sample has anywhere, and pictures: a bundle's engine, or a pipeline."""

    @property
    def batch(self) -> int:
        """Samples that one call may take."""

    def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:
        """Velocities (n, N), after guidance, of n samples at `latents` (n, N), both float32.

        `step` is on the grid of the recording, whose sigma and timestep the network is fed; n is at
        most `batch`, and the prompts condition one sample each.
        """

    def pictures(self, latents: Array) -> Array:
        """Decode final latents (n, N), at most `batch`: (n, H, W, C) float32 in [0, 1].

        Of videos (n, frames, H, W, C).
        """


BATCH_VALUES = 2**20
"""Values in the latents of one batch: 4 pictures of 1024 x 1024 of FLUX.1, or a single video."""


MOST_AT_ONCE = 16
"""So that memory does not grow with the samples where latents are small."""


def batch_of(latent_size: int, samples: int) -> int:
    """How many samples to evaluate at a time, for latents of `latent_size` values each."""
    return max(1, min(samples, MOST_AT_ONCE, BATCH_VALUES // latent_size))
