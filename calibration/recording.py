"""Recording from any diffusers flow-matching pipeline, through its scheduler.

The scheduler's `step` is where every such pipeline hands over the velocity, after guidance. This
module imports torch and diffusers; import it where it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)

from meancache_trt.calibration.trajectories import Array, OnStep, Prompt, Settings
from meancache_trt.errors import CalibrationError, ScheduleError
from meancache_trt.meancache.euler_scheduler import (
    BaseScheduler,
    EulerScheduler,
    euler_options,
    stock_grid,
)
from meancache_trt.meancache.schedule import ModelReference
from meancache_trt.meancache.sigmas import SecondStage, SigmaGrid


class StepSink(Protocol):
    """What a `RecordingScheduler` reports to. Tensors are the pipeline's own; copy to keep them."""

    def begin(self, grid: SigmaGrid, latent: torch.Tensor) -> None:
        """Called once before the first step, with the initial latent."""

    def add(self, step: int, sigma: float, velocity: torch.Tensor) -> None:
        """Called at each of the T steps, with the velocity at `sigma`."""

    def end(self, latent: torch.Tensor) -> None:
        """Called once after the last step, with the final latent."""


class RecordingScheduler(EulerScheduler):
    """The flow-matching Euler scheduler, which also reports each step to a sink.

    The latents are the stock Euler scheduler's, bit for bit; UniPC's grid is followed by Euler. A
    configuration holds no sink: after `from_pretrained`, use `around` to record.
    """

    _sink: StepSink | None = None
    _grid: SigmaGrid

    @classmethod
    def around(cls, base_scheduler: BaseScheduler, sink: StepSink) -> RecordingScheduler:
        """Record Euler's method on the grid of `base_scheduler`.

        Raises `CalibrationError` where it cannot.
        """
        try:
            options = euler_options(base_scheduler)
        except ScheduleError as error:
            raise CalibrationError(str(error)) from error
        if options.get("stochastic_sampling") or options.get("invert_sigmas"):
            raise CalibrationError(
                "the pipeline's scheduler sets stochastic_sampling or invert_sigmas, where no "
                "velocity can be reused; turn it off"
            )
        scheduler: RecordingScheduler = cls.from_config(options)
        scheduler._sink = sink
        return scheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the stock scheduler; the grid is what the sink will be given."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._grid = stock_grid(self, sigmas, mu)

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
        """As the stock scheduler. Raises `CalibrationError` for per-token timesteps."""
        if per_token_timesteps is not None:
            raise CalibrationError(
                "expected one timestep for the whole latent, found per_token_timesteps; this "
                "pipeline cannot be recorded"
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        step: int = self.step_index
        if self._sink and step == 0:
            self._sink.begin(self._grid, sample)
        if self._sink:
            self._sink.add(step, self._grid.sigmas[step], model_output)
        moved = super().step(
            model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator
        )
        if self._sink and step + 1 == self._grid.steps:
            self._sink.end(moved.prev_sample)
        return moved if return_dict else (moved.prev_sample,)


@dataclass(frozen=True)
class PipelineCall:
    """How a pipeline is called, apart from prompt and seed.

    `guidance_argument` names the pipeline's argument for `guidance_scale` ("true_cfg_scale" in
    QwenImagePipeline). `options` are further arguments, such as `max_sequence_length`. `condition`
    turns a text into arguments; give one that returns embeddings where the pipeline has no text
    encoders. `image_tokens` is for the record, where mu depends on the steps (`SigmaGrid`).
    """

    steps: int
    height: int
    width: int
    frames: int | None = None
    guidance_scale: float | None = None
    guidance_argument: str = "guidance_scale"
    options: Mapping[str, Any] = field(default_factory=dict)
    condition: Callable[[str], Mapping[str, Any]] = lambda text: {"prompt": text}
    image_tokens: int | None = None

    def arguments(self, prompt: Prompt) -> dict[str, Any]:
        """The pipeline's keyword arguments for one sample, decoding left out.

        The noise comes from torch's CPU generator, as in `pipe(..., generator=...)`.
        """
        arguments: dict[str, Any] = {
            **self.condition(prompt.text),
            "num_inference_steps": self.steps,
            "height": self.height,
            "width": self.width,
            "generator": torch.Generator("cpu").manual_seed(prompt.seed),
            "output_type": "latent",
            **self.options,
        }
        scale = self.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale
        if scale is not None:
            arguments[self.guidance_argument] = scale
        if self.frames is not None:
            arguments["num_frames"] = self.frames
        return arguments


class PipelineSampler:
    """A diffusers pipeline as a `Sampler`. Its own scheduler is put back after each sample."""

    def __init__(self, pipeline: Any, call: PipelineCall) -> None:
        self._pipeline = pipeline
        self._call = call

    def __call__(self, prompt: Prompt, on_step: OnStep) -> tuple[Array, Array]:
        """See `Sampler`; one pipeline call."""
        ends = _Ends(on_step)
        self._run(prompt, ends)
        return ends.initial, ends.final

    def settings(
        self,
        prompt: Prompt,
        *,
        family: str | None = None,
        model: ModelReference | None = None,
        precision: str = "float32",
        text_tokens: int | None = None,
        guidance_range: tuple[float, float] | None = None,
        second_stage: SecondStage | None = None,
    ) -> Settings:
        """The settings of recordings with this sampler.

        The grid is what the pipeline makes when it is called with `prompt`; costs one network
        evaluation. `second_stage` is the pipeline's own, which chooses between its transformers
        before a scheduler sees the velocity.
        """
        with contextlib.suppress(_GridKnownError):
            self._run(prompt, probe := _GridProbe())
        call = self._call
        grid = msgspec.structs.replace(
            probe.grid,
            height=call.height,
            width=call.width,
            frames=call.frames,
            image_tokens=None if probe.grid.mu is None else call.image_tokens,
            second_stage=second_stage,
        )
        return Settings(
            grid=grid,
            guidance_scale=self._call.guidance_scale,
            guidance_range=guidance_range,
            family=family,
            model=model,
            precision=precision,
            text_tokens=text_tokens,
        )

    def _run(self, prompt: Prompt, sink: StepSink) -> None:
        scheduler = RecordingScheduler.around(self._pipeline.scheduler, sink)
        with scheduler_replaced(self._pipeline, scheduler):
            self._pipeline(**self._call.arguments(prompt))


def load_pipeline(directory: Path) -> Any:
    """The diffusers pipeline of a folder, float32 on the CPU, without its own progress bars.

    Raises `CalibrationError` where diffusers cannot load it.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"expected a complete diffusers pipeline in {directory}, found: {error}; check that "
            "every component is there"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def scheduler_replaced(pipeline: Any, scheduler: EulerScheduler) -> Iterator[None]:
    """The pipeline with another scheduler; its own is put back at the end of the `with`."""
    original = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        yield
    finally:
        pipeline.scheduler = original


class _Ends:
    """Passes velocities on as float32 arrays and keeps both ends."""

    initial: Array
    final: Array

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def begin(self, grid: SigmaGrid, latent: torch.Tensor) -> None:  # noqa: ARG002
        self.initial = as_array(latent)

    def add(self, step: int, sigma: float, velocity: torch.Tensor) -> None:  # noqa: ARG002
        self._on_step(step, as_array(velocity))

    def end(self, latent: torch.Tensor) -> None:
        self.final = as_array(latent)


class _GridKnownError(Exception):
    """Ends a pipeline call whose grid was all that was wanted."""


class _GridProbe:
    grid: SigmaGrid

    def begin(self, grid: SigmaGrid, latent: torch.Tensor) -> None:  # noqa: ARG002
        self.grid = grid
        raise _GridKnownError

    def add(self, step: int, sigma: float, velocity: torch.Tensor) -> None: ...

    def end(self, latent: torch.Tensor) -> None: ...


def as_array(tensor: torch.Tensor) -> Array:
    """A float32 copy in the memory of the host."""
    return np.array(tensor.detach().to("cpu", torch.float32).numpy(), order="C")
