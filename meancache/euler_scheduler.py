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

# What decides UniPC's grid, by names that `EulerScheduler` has too.
_FLOW_SIGMAS_OPTIONS = (
    "num_train_timesteps",
    "use_flow_sigmas",
    "flow_shift",
    "use_dynamic_shifting",
    "time_shift_type",
    "shift_terminal",
)


class EulerScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Flow-matching Euler; with `use_flow_sigmas` on the grid that UniPC makes by `flow_shift`."""

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
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
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
        self._has_flow_sigmas = use_flow_sigmas
        self._flow_shift = flow_shift

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
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        if not self._has_flow_sigmas:
            return
        if num_inference_steps is None or sigmas is not None or timesteps is not None:
            raise ScheduleError(
                "expected a pipeline that gives its UniPCMultistepScheduler the number of steps "
                "alone, found sigmas or timesteps; give the pipeline a "
                "FlowMatchEulerDiscreteScheduler"
            )
        grid = self._flow_sigmas(num_inference_steps, mu)
        self.sigmas = torch.tensor(grid.sigmas, dtype=torch.float32, device=device)
        self.timesteps = torch.tensor(grid.timesteps, dtype=torch.float32, device=device)

    def _flow_sigmas(self, steps: int, mu: float | None) -> SigmaGrid:
        config = self.config
        return make_grid(
            steps,
            convention="flow_sigmas",
            shift=self._flow_shift,
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
    return {name: config[name] for name in _FLOW_SIGMAS_OPTIONS}


def stock_grid(
    scheduler: FlowMatchEulerDiscreteScheduler, sigmas: Sequence[float] | None, mu: float | None
) -> SigmaGrid:
    """The grid that the stock `set_timesteps` has just left in `scheduler`.

    `sigmas` and `mu` are what it was given. Of a second stage a scheduler knows nothing. Raises
    `ScheduleError` where sigmas do not descend.
    """
    config, steps = scheduler.config, len(scheduler.timesteps)
    is_dynamic, is_flow = config.use_dynamic_shifting, config.get("use_flow_sigmas", False)
    return SigmaGrid(
        steps=steps,
        sigmas=tuple(scheduler.sigmas.tolist()),
        timesteps=tuple(scheduler.timesteps.tolist()),
        convention="flow_sigmas" if is_flow else _convention(sigmas, steps),
        num_train_timesteps=config.num_train_timesteps,
        shift=None if is_dynamic else float(config.flow_shift if is_flow else scheduler.shift),
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
