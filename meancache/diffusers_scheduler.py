"""A schedule as a diffusers scheduler: any flow-matching pipeline skips steps, unmodified.

    pipe.scheduler = MeanCacheScheduler.from_file("b10.json", pipe.scheduler)
    image = pipe(prompt, num_inference_steps=50).images[0]      # 10 network evaluations

Image-to-image and inpainting take `pipe.scheduler.for_strength(0.6)` and `strength=1.0`.

This module imports torch and diffusers; import it where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.euler_scheduler import (
    BaseScheduler,
    EulerScheduler,
    euler_options,
    stock_grid,
)
from meancache_trt.meancache.schedule import Schedule, load_schedule
from meancache_trt.meancache.shifts import TimeShift
from meancache_trt.meancache.sigmas import SigmaGrid
from meancache_trt.meancache.strength import begin_at, first_step

_UNSUPPORTED = ("stochastic_sampling", "invert_sigmas")
_OWN_OPTIONS = ("schedule", "strength")  # what the stock scheduler's configuration does not have


class MeanCacheScheduler(EulerScheduler):
    """Flow-matching Euler over T steps that asks for the velocity at the schedule's B nodes only.

    Call the pipeline with T (`num_inference_steps=50`), not B: the grid may depend on it, and is
    checked against the schedule's. An analytic schedule without calibration is refolded for the
    pipeline's own grid of as many steps. The schedule is part of the configuration, so that
    `save_pretrained` and `from_pretrained` keep it; the stock scheduler reads the same file and
    ignores it, and that its grid may be UniPC's.

    A pipeline of two transformers chooses between them itself, by the timesteps that it is given:
    those of the nodes, so that it runs what the schedule's rows name. One history holds the
    velocities of both.

    The guidance scale acts inside the pipeline and cannot be seen here: pass the one that
    `schedule.guidance_scale` names. A pipeline that enters the grid midway by itself, as
    image-to-image does with a strength below 1, gets a `ScheduleError`: see `for_strength`.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0917  (the stock scheduler's signature)
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: TimeShift = "exponential",
        stochastic_sampling: bool = False,
        has_unipc_grid: bool = False,
        schedule: dict[str, Any] | None = None,
        strength: float = 1.0,
    ) -> None:
        # Named one by one, because diffusers reads the signature to load a configuration.
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
            has_unipc_grid=has_unipc_grid,
        )
        self._check_options()
        self._strength = strength
        self._original = _decode(schedule)
        self._schedule = self._begun(self._original)
        self._rows = _rows(self._schedule, torch.device("cpu"))
        self._velocities: list[torch.Tensor] = []

    @classmethod
    def from_schedule(cls, schedule: Schedule, base_scheduler: BaseScheduler) -> MeanCacheScheduler:
        """Run `schedule` on the grid that `base_scheduler`, the pipeline's own, would make.

        That is diffusers' flow-matching Euler scheduler, or a UniPCMultistepScheduler of flow
        matching, as Wan's; of the latter only the grid is kept. Raises `ScheduleError` for another
        kind of scheduler, and for options that a schedule cannot follow.
        """
        config = euler_options(base_scheduler)
        options = {key: value for key, value in config.items() if key not in _OWN_OPTIONS}
        scheduler: MeanCacheScheduler = cls.from_config(options, schedule=_encode(schedule))
        return scheduler

    @classmethod
    def from_file(cls, path: Path | str, base_scheduler: BaseScheduler) -> MeanCacheScheduler:
        """Like `from_schedule`, from a schedule file."""
        return cls.from_schedule(load_schedule(path), base_scheduler)

    def for_strength(self, strength: float) -> MeanCacheScheduler:
        """The same schedule for image-to-image or inpainting, which begin midway.

            pipe.scheduler = scheduler.for_strength(0.6)
            pipe(prompt, image=picture, strength=1.0, num_inference_steps=50)

        The new scheduler's first timestep is the one at which diffusers begins for `strength`
        among T steps. Pass the pipeline strength 1.0, with T as usual: it then starts with this
        scheduler's first timestep, for which it mixes picture and noise. A lower strength is
        refused where it would drop a node. A text-to-image pipeline would start from noise alone,
        at a step that expects a picture in it, and cannot be told from the others here.

        The step where it begins is always evaluated. `begin_at` says what becomes of the rows.
        Raises `ScheduleError` for a strength outside (0, 1] or that leaves no step.
        """
        scheduler: MeanCacheScheduler = self.from_config(self.config, strength=strength)
        return scheduler

    @property
    def schedule(self) -> Schedule:
        """The schedule in use; refolded for the pipeline's grid once `set_timesteps` has run.

        With a strength below 1 it is what is left of it, on what is left of the grid.
        """
        return self._schedule

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Make the pipeline's grid of T steps, check it, and keep the B timesteps of the nodes.

        The arguments are the stock scheduler's. Afterwards `timesteps` has B entries and `sigmas`
        B + 1, with the end of the grid last; recorded velocities are forgotten. B counts the nodes
        that the strength leaves.

        Raises:
            ScheduleError: where the number of steps or the sigmas differ from the schedule's and
                it cannot be refolded.
        """
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        grid = stock_grid(self, sigmas, mu)
        _check_steps(self._original, grid)
        fitted = self._original.on_grid(grid)
        self._schedule = self._begun(fitted)
        begin = grid.steps - self._schedule.grid.steps
        nodes = [begin + node for node in self._schedule.nodes]
        self.timesteps = self.timesteps[nodes]
        self.sigmas = self.sigmas[[*nodes, grid.steps]]
        self.num_inference_steps = len(nodes)
        self._rows = _rows(self._schedule, self.sigmas.device)
        self._velocities = []

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Accept index 0 only: a later node would read velocities that were never evaluated."""
        self._check_begins_at_start(begin_index)
        super().set_begin_index(begin_index)

    def step(  # noqa: PLR0917  (the stock scheduler's signature)
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,  # noqa: ARG002
        s_tmin: float = 0.0,  # noqa: ARG002
        s_tmax: float = float("inf"),  # noqa: ARG002
        s_noise: float = 1.0,  # noqa: ARG002
        generator: torch.Generator | None = None,  # noqa: ARG002
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """Move the latent from this node to the next by the schedule's row of weights.

        Args:
            model_output: velocity at this node, after guidance, any shape.
            timestep: entry of `timesteps`; read at the first node only.
            sample: latent of the same shape.
            s_churn: unused, as in the stock scheduler; so are the next four.
            s_tmin: unused.
            s_tmax: unused.
            s_noise: unused.
            generator: unused; nothing here is random.
            per_token_timesteps: must be None.
            return_dict: whether to wrap the latent in diffusers' output class.

        Returns:
            The latent at the next node, in the velocity's dtype, accumulated in float32.

        Raises:
            ScheduleError: for per-token timesteps, past the last node, or when begun midway.
        """
        if per_token_timesteps is not None:
            raise ScheduleError(
                "a schedule moves the whole latent along one grid, found per_token_timesteps; use "
                "the stock scheduler for this pipeline"
            )
        latent = self._advance(self._next_node(timestep), model_output, sample)
        if not return_dict:
            return (latent,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=latent)

    def _begun(self, schedule: Schedule) -> Schedule:
        return begin_at(schedule, first_step(schedule.grid.steps, self._strength))

    def _next_node(self, timestep: float | torch.Tensor) -> int:
        if self.step_index is None:
            self._start(timestep)
        node: int = self.step_index
        if node >= self._schedule.budget:
            raise ScheduleError(
                f"schedule {self._schedule.name!r} has {self._schedule.budget} nodes and all are "
                "done; call set_timesteps before the next image"
            )
        self._step_index = node + 1
        return node

    def _start(self, timestep: float | torch.Tensor) -> None:
        self._init_step_index(timestep)
        self._check_begins_at_start(self.step_index)

    def _advance(self, node: int, velocity: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        # A copy, because a network in a CUDA graph writes its next output to the same memory.
        kept = velocity.clone() if self._schedule.history > 1 else velocity
        self._velocities = [kept, *self._velocities][: self._schedule.history]
        moved = latent.to(torch.float32)
        for weight, past in zip(self._rows[node], self._velocities, strict=False):
            # The weight has no dimensions, so that the product keeps the velocity's dtype: with
            # one weight a row this is the stock scheduler's arithmetic, bit for bit.
            moved = moved + weight * past
        if node + 1 == self._schedule.budget:
            self._velocities = []
        return moved.to(velocity.dtype)

    def _check_begins_at_start(self, begin_index: int) -> None:
        if begin_index:
            raise ScheduleError(
                f"schedule {self._schedule.name!r} starts at node 0, but the pipeline starts at "
                f"node {begin_index}, as image-to-image does with a strength below 1; give it "
                "scheduler.for_strength(strength) and call it with strength=1.0"
            )

    def _check_options(self) -> None:
        for option in _UNSUPPORTED:
            if self.config[option]:
                raise ScheduleError(
                    f"the pipeline's scheduler sets {option}, which a schedule of cached "
                    "velocities cannot follow; turn it off or keep the stock scheduler"
                )


def _check_steps(schedule: Schedule, grid: SigmaGrid) -> None:
    steps = schedule.grid.steps
    if grid.steps != steps:
        raise ScheduleError(
            f"schedule {schedule.name!r} skips steps of a grid of {steps}, but the pipeline makes "
            f"one of {grid.steps}; call it with num_inference_steps={steps} (the schedule chooses "
            f"its {schedule.budget} evaluations itself)"
        )


def _rows(schedule: Schedule, device: torch.device) -> list[list[torch.Tensor]]:
    """The weights as float32 tensors without dimensions, on `device`."""
    table = torch.from_numpy(schedule.table(schedule.history)).to(device)
    lengths = map(len, schedule.weights)
    return [list(row[:length]) for row, length in zip(table, lengths, strict=True)]


def _encode(schedule: Schedule) -> dict[str, Any]:
    """The schedule as what JSON gives back, so that a loaded configuration equals a saved one."""
    encoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schedule))
    return encoded


def _decode(encoded: dict[str, Any] | None) -> Schedule:
    if encoded is None:
        raise ScheduleError(
            "this scheduler's configuration holds no schedule; make it with "
            'MeanCacheScheduler.from_file("schedule.json", pipe.scheduler)'
        )
    try:
        return msgspec.convert(encoded, Schedule)
    except msgspec.ValidationError as fault:
        raise ScheduleError(f"not a valid schedule in the configuration: {fault}") from fault
