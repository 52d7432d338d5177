"""A diffusers pipeline as the velocity field of its own recordings, where there is no engine.

One evaluation is one call of the pipeline with a scheduler that has a single step. So it works for
every pipeline that takes latents; the text is encoded anew each time. This module imports torch and
diffusers; import it where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)

from meancache_trt.calibration.recording import PipelineCall, as_array, scheduler_replaced
from meancache_trt.calibration.trajectories import Array, Prompt
from meancache_trt.calibration.velocity_field import batch_of
from meancache_trt.meancache.euler_scheduler import (
    BaseScheduler,
    EulerScheduler,
    euler_options,
)

Decode = Callable[[torch.Tensor], torch.Tensor]
"""Final latent (1, *latent shape) -> image (1, C, …) in [0, 1]."""


class SingleStepScheduler(EulerScheduler):
    """The pipeline's grid, of which one step is evaluated; the latent stays where it is."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor
    velocity: torch.Tensor
    _only: int

    @classmethod
    def at(cls, base_scheduler: BaseScheduler, step: int) -> SingleStepScheduler:
        """Evaluate `step` of the grid that `base_scheduler` would make."""
        scheduler: SingleStepScheduler = cls.from_config(euler_options(base_scheduler))
        scheduler._only = step
        return scheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the stock scheduler, cut to the one step."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.timesteps = self.timesteps[self._only : self._only + 1]
        self.sigmas = self.sigmas[self._only : self._only + 2]

    def step(  # noqa: PLR0917  (the stock scheduler's signature)
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,  # noqa: ARG002
        sample: torch.Tensor,
        s_churn: float = 0.0,  # noqa: ARG002
        s_tmin: float = 0.0,  # noqa: ARG002
        s_tmax: float = float("inf"),  # noqa: ARG002
        s_noise: float = 1.0,  # noqa: ARG002
        generator: torch.Generator | None = None,  # noqa: ARG002
        per_token_timesteps: torch.Tensor | None = None,  # noqa: ARG002
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """Keep the velocity."""
        self.velocity = model_output
        return FlowMatchEulerDiscreteSchedulerOutput(sample) if return_dict else (sample,)


@dataclass(frozen=True)
class PipelineField:
    """The network and the VAE of a pipeline; see `VelocityField`.

    `call` is how it was recorded, `latent_shape` that of the loop's latent of one sample, of which
    `argument` makes what the pipeline takes as `latents`.
    """

    pipeline: Any
    call: PipelineCall
    latent_shape: tuple[int, ...]
    decode: Decode
    samples: int
    argument: Callable[[torch.Tensor], torch.Tensor] = lambda latent: latent

    @property
    def batch(self) -> int:
        """See `VelocityField`; they are evaluated one after the other."""
        return batch_of(int(np.prod(self.latent_shape)), self.samples)

    def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:
        """See `VelocityField`."""
        pairs = zip(prompts, latents, strict=True)
        return np.stack([self._velocity(prompt, latent, step) for prompt, latent in pairs])

    def pictures(self, latents: Array) -> Array:
        """See `VelocityField`."""
        with torch.inference_mode():
            images = [self.decode(self._tensor(latent)).float() for latent in latents]
        return np.ascontiguousarray(np.moveaxis(torch.cat(images).numpy(), 1, -1))

    def _velocity(self, prompt: Prompt, latent: Array, step: int) -> Array:
        scheduler = SingleStepScheduler.at(self.pipeline.scheduler, step)
        with scheduler_replaced(self.pipeline, scheduler):
            latents = self.argument(self._tensor(latent))
            self.pipeline(**self.call.arguments(prompt), latents=latents)
        return as_array(scheduler.velocity).reshape(-1)

    def _tensor(self, latent: Array) -> torch.Tensor:
        return torch.from_numpy(latent.reshape(1, *self.latent_shape))
