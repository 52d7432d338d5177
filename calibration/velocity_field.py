"""What a fit along a method's own trajectories asks of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from meancache_trt.calibration.trajectories import Array, Prompt


class VelocityField(Protocol):
    """The velocity that a sample has anywhere: a bundle's engine, or a formula."""

    @property
    def batch(self) -> int:
        """Samples that one call may take."""

    def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:
        """Velocities (n, N), after guidance, of n samples at `latents` (n, N), both float32.

        `step` is on the grid of the recording, whose sigma and timestep the network is fed; n is at
        most `batch`, and the prompts condition one sample each.
        """
