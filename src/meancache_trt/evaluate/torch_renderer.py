"""A diffusers pipeline as a `Renderer`: no engine, no bundle.

This module imports torch and diffusers; import it where it is used.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)

from meancache_trt.calibration.evaluation import Setup
from meancache_trt.calibration.recording import (
    PipelineCall,
    PipelineSampler,
    as_array,
    scheduler_replaced,
)
from meancache_trt.calibration.trajectories import Prompt
from meancache_trt.errors import ScheduleError
from meancache_trt.evaluate.renderer import Render
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.pipeline import identify
from meancache_trt.export.registry import detect
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.schedule import Schedule
from meancache_trt.meancache.sigmas import SigmaGrid
from meancache_trt.session import Batch


class TimedScheduler(MeanCacheScheduler):
    """A `MeanCacheScheduler` that keeps the final latent, and the loop's time.

    The loop is from the end of `set_timesteps` to the end of the last step, as pipelines call them.
    """

    final: torch.Tensor | None = None
    loop_s: float = 0.0
    _started_s: float = 0.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the scheduler beneath."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._started_s = time.perf_counter()

    def step(  # noqa: PLR0917  (the stock scheduler's signature)
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """As the scheduler beneath."""
        moved = super().step(
            model_output,
            timestep,
            sample,
            s_churn,
            s_tmin,
            s_tmax,
            s_noise,
            generator,
            per_token_timesteps,
            return_dict,
        )
        self.final = moved[0]
        self.loop_s = time.perf_counter() - self._started_s
        return moved


class TorchRenderer:
    """A checkpoint's own pipeline, one picture at a time, as `call` says but for its steps.

    Noise is torch's, as for `pipe(..., generator=...)`. The pipeline has its own scheduler again
    after each picture, so that others can use it between.
    """

    batch = 1

    def __init__(self, checkpoint: Checkpoint, pipeline: Any, call: PipelineCall) -> None:
        self._checkpoint, self._pipeline, self._call = checkpoint, pipeline, call

    def grid(self, steps: int) -> SigmaGrid:
        """See `Renderer`; what the pipeline makes when it is called with so many steps."""
        sampler = PipelineSampler(self._pipeline, replace(self._call, steps=steps))
        return sampler.settings(Prompt("")).grid

    def open(self, schedule: Schedule) -> Render:
        """See `Renderer`."""
        self._check(schedule)
        scheduler = TimedScheduler.from_schedule(schedule, self._pipeline.scheduler)
        assert isinstance(scheduler, TimedScheduler)

        def render(prompts: Sequence[Prompt]) -> Batch:
            (prompt,) = prompts
            arguments = {
                **self._call.arguments(prompt),
                "num_inference_steps": schedule.grid.steps,
                "output_type": "np",
            }
            with scheduler_replaced(self._pipeline, scheduler):
                pictures = self._pipeline(**arguments)[0]
            assert scheduler.final is not None
            return Batch(as_array(scheduler.final), np.asarray(pictures), 1e3 * scheduler.loop_s)

        return render

    def _check(self, schedule: Schedule) -> None:
        """Refuse what the scheduler cannot see: another model, another guidance scale."""
        model = identify(self._checkpoint)
        if schedule.model is not None and schedule.model.digest not in {None, model.digest}:
            raise ScheduleError(
                f"schedule {schedule.name!r} was calibrated on {schedule.model.name!r}, this is "
                f"{model.name!r} with other weights; calibrate on this checkpoint"
            )
        schedule.fit_to(schedule.grid, self._call.guidance_scale)
        second, used = schedule.grid.second_stage, self._call.options.get("guidance_scale_2")
        if second is not None and second.guidance_scale != used:
            raise ScheduleError(
                f"schedule {schedule.name!r} is for a second transformer {second}, this pipeline "
                f"is called with the second guidance scale {used}; evaluate a bundle of that scale"
            )

    def setup(self, steps: int, reference_steps: int | None) -> Setup:
        """See `Renderer`."""
        model, family = identify(self._checkpoint), detect(self._checkpoint.path)
        rule = family.frames and family.frames(self._checkpoint.configs(("vae",)))
        return Setup(
            model=model.name,
            digest=model.digest,
            family=family.name,
            bundle_id=None,
            renderer=f"diffusers {diffusers.__version__}, torch {torch.__version__}",
            threads=torch.get_num_threads(),
            batch=self.batch,
            height=self._call.height,
            width=self._call.width,
            frames=self._call.frames,
            frames_per_second=rule.per_second if rule else None,
            steps=steps,
            reference_steps=reference_steps,
            guidance_scale=self._call.guidance_scale,
            precision="float32",
            noise="torch",
        )


@contextlib.contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Let torch use so many cores; 0 leaves what it uses."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
