"""diffusers' flow-matching Euler scheduler, also on the grid of a UniPCMultistepScheduler.

Wan's checkpoints name that one. What a schedule needs of it is its grid: its updates are a method
here ("unipc"). This module imports torch and diffusers; import it where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.shifts import TimeShift
from meancache_trt.meancache.sigmas import (
    Convention,
    SigmaGrid,
    check_flow_sigmas,
    make_grid,
    pipeline_sigmas,
)

BaseScheduler: TypeAlias = FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler

_LINSPACES: tuple[Convention, ...] = ("linspace", "linspace_to_zero")

# What decides UniPC's grid besides its shift, by names that `EulerScheduler` has too.
_UNIPC_OPTIONS = (
    "num_train_timesteps",
    "use_dynamic_shifting",
    "time_shift_type",
    "shift_terminal",
)


class EulerScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Flow-matching Euler; with `has_unipc_grid` on the grid that UniPC makes with that shift.

    UniPC's own names for these, `use_flow_sigmas` and `flow_shift`, stay in the configuration of a
    stock scheduler that was made of UniPC's, where they mean nothing.
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
        )
        self._has_unipc_grid = has_unipc_grid

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the stock scheduler whose grid this is.

        Raises `ScheduleError` where UniPC's is asked for and sigmas are given.
        """
        is_count = num_inference_steps is not None and sigmas is None and timesteps is None
        if self._has_unipc_grid and not is_count:
            raise ScheduleError(
                "expected a pipeline that gives its UniPCMultistepScheduler the number of steps "
                "alone, found sigmas or timesteps; give the pipeline a "
                "FlowMatchEulerDiscreteScheduler"
            )
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        if not self._has_unipc_grid or num_inference_steps is None:
            return
        grid = self._unipc_grid(num_inference_steps, mu)
        self.sigmas = torch.tensor(grid.sigmas, dtype=torch.float32, device=device)
        self.timesteps = torch.tensor(grid.timesteps, dtype=torch.float32, device=device)

    def index_for_timestep(
        self,
        timestep: float | torch.Tensor,
        schedule_timesteps: torch.Tensor | None = None,
    ) -> int:
        """As the stock scheduler, but the first of equal timesteps: UniPC's are whole numbers."""
        if not self._has_unipc_grid:
            return int(super().index_for_timestep(timestep, schedule_timesteps))
        among = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return int((among == timestep).nonzero()[0])

    def _unipc_grid(self, steps: int, mu: float | None) -> SigmaGrid:
        config = self.config
        return make_grid(
            steps,
            convention="flow_sigmas",
            shift=config.shift,
            mu=mu if config.use_dynamic_shifting else None,
            time_shift_type=config.time_shift_type,
            shift_terminal=config.shift_terminal,
            num_train_timesteps=config.num_train_timesteps,
        )


def euler_options(base_scheduler: BaseScheduler) -> Mapping[str, Any]:
    """The configuration of an `EulerScheduler` on the grid of `base_scheduler`.

    Raises `ScheduleError` for another kind of scheduler, and for a UniPCMultistepScheduler that is
    not one of flow matching.
    """
    config: Mapping[str, Any] = base_scheduler.config
    if isinstance(base_scheduler, FlowMatchEulerDiscreteScheduler):
        return config
    if not isinstance(base_scheduler, UniPCMultistepScheduler):
        raise ScheduleError(
            "expected a pipeline with a FlowMatchEulerDiscreteScheduler, or a "
            "UniPCMultistepScheduler of flow matching, found "
            f"{type(base_scheduler).__name__}; give the pipeline its flow-matching Euler "
            "scheduler first"
        )
    check_flow_sigmas(config)
    options = {name: config[name] for name in _UNIPC_OPTIONS}
    return {**options, "shift": config["flow_shift"], "has_unipc_grid": True}


def stock_grid(
    scheduler: FlowMatchEulerDiscreteScheduler, sigmas: Sequence[float] | None, mu: float | None
) -> SigmaGrid:
    """The grid that the stock `set_timesteps` has just left in `scheduler`.

    `sigmas` and `mu` are what it was given. Of a second stage a scheduler knows nothing. Raises
    `ScheduleError` where sigmas do not descend.
    """
    config, steps = scheduler.config, len(scheduler.timesteps)
    is_dynamic, is_flow = config.use_dynamic_shifting, config.get("has_unipc_grid", False)
    return SigmaGrid(
        steps=steps,
        sigmas=tuple(scheduler.sigmas.tolist()),
        timesteps=tuple(scheduler.timesteps.tolist()),
        convention="flow_sigmas" if is_flow else _convention(sigmas, steps),
        num_train_timesteps=config.num_train_timesteps,
        shift=None if is_dynamic else float(scheduler.shift),
        mu=float(mu) if is_dynamic and mu is not None else None,
        time_shift_type=config.time_shift_type if is_dynamic else None,
        shift_terminal=config.shift_terminal or None,
    )


def _convention(sigmas: Sequence[float] | None, steps: int) -> Convention:
    if sigmas is None:
        return "count"
    for convention in _LINSPACES:
        if np.array_equal(sigmas, pipeline_sigmas(convention, steps)):
            return convention
    return "custom"
