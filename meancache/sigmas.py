"""Sigma grids, equal to those of diffusers' flow-matching schedulers to the last bit.

`FlowMatchEulerDiscreteScheduler` and, with `use_flow_sigmas`, `UniPCMultistepScheduler`.
Integration runs from sigma 1 (noise) to sigma 0 (image). Element types below follow diffusers
step by step, because a grid that differs in its last bit is another grid: pipelines that hand
over sigmas are shifted in float32, pipelines that hand over a count only are shifted in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.shifts import (
    TimeShift,
    check_shifts,
    counted,
    exact_timesteps,
    shifted,
    whole_timesteps,
)

Convention = Literal["linspace", "linspace_to_zero", "count", "flow_sigmas", "custom"]
MuRule = Literal["line", "empirical"]

SIGMA_TOLERANCE = 1e-6
"""Grids closer than this at every step are the same grid (float32 resolves 6e-8 at sigma 1)."""

FLOW_SIGMAS_SCHEDULER = "UniPCMultistepScheduler"
"""Whose `use_flow_sigmas` means the convention "flow_sigmas"."""

_UNSUPPORTED = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


class SecondStage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a model of two transformers hands over to the second, and how that one is guided.

    At timesteps below `boundary_timestep`, in the scheduler's units, the network is transformer_2.
    `guidance_scale` is its own classifier-free scale; None where the first one's acts in both.
    """

    boundary_timestep: float
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.boundary_timestep < math.inf:
            raise ScheduleError(
                "the timestep of a second stage is 0 or more and finite, found "
                f"{self.boundary_timestep:g}; Wan 2.2 has 875"
            )

    def __str__(self) -> str:
        """In a few words, such as "below timestep 875, guidance scale 3"."""
        scale = "" if self.guidance_scale is None else f", guidance scale {self.guidance_scale:g}"
        return f"below timestep {self.boundary_timestep:g}{scale}"


class SigmaGrid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The T steps that a model's full integration takes, and how they were made.

    `sigmas` has T + 1 descending values, of which the last may repeat; `timesteps` has T, in the
    scheduler's units (sigma x `num_train_timesteps`, whole numbers in "flow_sigmas"). All are
    float32 values. `shift` is the static shift, `mu` the dynamic one; exactly one of them acts.
    `height`, `width` (pixels) and `frames` are set where the grid depends on them or belongs to
    them; `image_tokens` where `mu` is the `empirical_mu` of them, which is another with other
    steps; `second_stage` where the model has two transformers and whoever made the grid knows it.
    """

    steps: int
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    convention: Convention = "linspace"
    num_train_timesteps: int = 1000
    shift: float | None = None
    mu: float | None = None
    time_shift_type: TimeShift | None = None
    shift_terminal: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    image_tokens: int | None = None
    second_stage: SecondStage | None = None

    def __post_init__(self) -> None:
        check_sigmas(self.sigmas, self.steps)
        if len(self.timesteps) != self.steps:
            raise ScheduleError(
                f"a grid of {self.steps} steps has {self.steps} timesteps, found "
                f"{len(self.timesteps)}; write the file again with `meancache-trt bake`"
            )
        if not np.isfinite(np.asarray(self.timesteps, np.float64)).all():
            raise ScheduleError(
                "a grid has a timestep that is not finite; write the file again with "
                "`meancache-trt bake`"
            )

    def array(self) -> NDArray[np.float64]:
        """The T + 1 sigmas as float64, shape (T + 1,)."""
        return np.asarray(self.sigmas, np.float64)

    def difference(self, other: SigmaGrid) -> str | None:
        """Say in words how `other` differs, or None where both are the same grid.

        Frames and second stage count where both grids name them, since a scheduler sees neither;
        the size counts through its sigmas alone.
        """
        if self.steps != other.steps:
            return f"{self.steps} steps against {other.steps}"
        if None not in (self.frames, other.frames) and self.frames != other.frames:
            return f"{self.frames} frames against {other.frames}"
        gap = np.abs(self.array() - other.array())
        step = int(gap.argmax())
        if gap[step] > SIGMA_TOLERANCE:
            return (
                f"sigma {self.sigmas[step]:.6f} against {other.sigmas[step]:.6f} at step {step} "
                f"({self.describe()} against {other.describe()})"
            )
        if self.num_train_timesteps != other.num_train_timesteps:
            return (
                f"timesteps of sigma x {self.num_train_timesteps} against "
                f"{other.num_train_timesteps}"
            )
        stages = (self.second_stage, other.second_stage)
        if None not in stages and stages[0] != stages[1]:
            return f"second stage {stages[0]} against {stages[1]}"
        return None

    def describe(self) -> str:
        """The grid in a few words, such as "50 steps, shift 3"."""
        shift = f"mu {self.mu:.4g}" if self.mu is not None else f"shift {self.shift or 1:.4g}"
        size = f", {self.width}x{self.height}" if self.width and self.height else ""
        return f"{self.steps} steps, {shift}{size}"


def check_sigmas(sigmas: Sequence[float], steps: int) -> None:
    """Raise `ScheduleError` unless `sigmas` are steps + 1 finite, descending values in [0, 1].

    They must descend as float32 too, which is what grids are kept in.
    """
    if steps < 1 or len(sigmas) != steps + 1:
        raise ScheduleError(
            f"a grid of {steps} steps has {steps + 1} sigmas (the last is where integration ends), "
            f"found {len(sigmas)}; use at least one step and give one sigma a step plus the last"
        )
    values = np.asarray(sigmas, np.float64)
    # A float32 shift of sigma 1 may round to 1 + 1e-7, in diffusers too.
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1 + SIGMA_TOLERANCE:
        raise ScheduleError(
            f"sigmas are finite and between 0 (image) and 1 (noise), found {values.min()} to "
            f"{values.max()}; give noise levels, not timesteps"
        )
    rises = np.flatnonzero(np.diff(values.astype(np.float32)) >= 0)
    if len(rises) and not (rises[0] == steps - 1 and values[-1] == values[-2]):
        step = int(rises[0])
        raise ScheduleError(
            f"sigmas must descend, found {values[step]} at step {step} before {values[step + 1]}; "
            "only the last may repeat"
        )


def make_grid(
    steps: int,
    *,
    convention: Convention = "linspace",
    shift: float = 1.0,
    mu: float | None = None,
    time_shift_type: TimeShift = "exponential",
    shift_terminal: float | None = None,
    sigmas: Sequence[float] | None = None,
    sigma_min: float | None = None,
    num_train_timesteps: int = 1000,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    image_tokens: int | None = None,
    second_stage: SecondStage | None = None,
) -> SigmaGrid:
    """Make the grid that a diffusers pipeline would integrate over.

    Args:
        steps: T, the number of Euler steps of the full integration.
        convention: what the pipeline hands to `set_timesteps`: "linspace" is
            `linspace(1, 1/T, T)` (FLUX, Qwen-Image), "linspace_to_zero" is `linspace(1, 0, T + 1)`
            without the 0 (HunyuanVideo; it rounds otherwise), "count" is the number alone (SD3,
            Z-Image), "flow_sigmas" is that number for a UniPCMultistepScheduler (Wan), "custom" is
            `sigmas`.
        shift: static shift, s·σ / (1 + (s − 1)·σ); ignored where `mu` is given.
        mu: dynamic, resolution-dependent shift; see `dynamic_mu`.
        time_shift_type: form of the dynamic shift.
        shift_terminal: last sigma before 0, to which the shifted grid is stretched.
        sigmas: T descending values before shifting, for "custom".
        sigma_min: lowest sigma of a "count" grid; by default that of the training grid.
        num_train_timesteps: timesteps are sigma times this.
        height: recorded in the grid, in pixels.
        width: recorded in the grid, in pixels.
        frames: recorded in the grid.
        image_tokens: recorded in the grid, whose mu is then the `empirical_mu` of them instead of
            `mu`.
        second_stage: recorded in the grid.

    Raises:
        ScheduleError: where T < 1 or the values do not descend.
    """
    if steps < 1:
        raise ScheduleError(f"a grid has at least one step, found {steps}; give --steps 1 or more")
    if num_train_timesteps < 1:
        raise ScheduleError(
            f"num_train_timesteps is at least 1, found {num_train_timesteps}; download the "
            "checkpoint again"
        )
    if image_tokens is not None:
        mu = empirical_mu(image_tokens, steps)
    check_shifts(shift, mu, time_shift_type, shift_terminal)
    if (convention == "custom") != (sigmas is not None):
        raise ScheduleError('pass `sigmas` with convention="custom", and only with it')
    if sigmas is not None:
        check_sigmas([*sigmas, 0.0], steps)
    if convention == "count":
        raw = counted(steps, shift if mu is None else 1.0, sigma_min, num_train_timesteps)
    elif convention == "flow_sigmas":
        raw = np.linspace(1, 1 / num_train_timesteps, steps + 1)[:-1]
    else:
        given = pipeline_sigmas(convention, steps) if sigmas is None else np.array(sigmas)
        raw = given.astype(np.float32)
    made = shifted(raw, shift, mu, time_shift_type, shift_terminal)
    scale = whole_timesteps if convention == "flow_sigmas" else exact_timesteps
    values, timesteps = scale(made, num_train_timesteps)
    return SigmaGrid(
        steps=steps,
        sigmas=(*values.tolist(), 0.0),
        timesteps=tuple(timesteps.tolist()),
        convention=convention,
        num_train_timesteps=num_train_timesteps,
        shift=shift if mu is None else None,
        mu=mu,
        time_shift_type=time_shift_type if mu is not None else None,
        shift_terminal=shift_terminal or None,
        height=height,
        width=width,
        frames=frames,
        image_tokens=image_tokens,
        second_stage=second_stage,
    )


def pipeline_sigmas(convention: Convention, steps: int) -> NDArray[np.float64]:
    """The T sigmas that a pipeline of either "linspace" convention hands over, before shifting."""
    if convention == "linspace_to_zero":
        return np.linspace(1.0, 0.0, steps + 1)[:-1]
    return np.linspace(1.0, 1 / steps, steps)


def grid_from_config(
    config: Mapping[str, Any],
    steps: int,
    *,
    convention: Convention = "linspace",
    mu_rule: MuRule = "line",
    image_tokens: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    sigma_min: float | None = None,
    second_stage: SecondStage | None = None,
) -> SigmaGrid:
    """Make the grid of a pipeline from its `scheduler_config.json`.

    `image_tokens` is the packed sequence length, from which dynamic shifting takes its mu: by
    `dynamic_mu` ("line") or by `empirical_mu`. Where the scheduler is a UniPCMultistepScheduler, or
    one of ours with its grid, a `convention` of "count" becomes "flow_sigmas". Raises
    `ScheduleError` for options that this project does not reproduce, such as Karras sigmas.
    """
    for option in _UNSUPPORTED:
        if config.get(option):
            raise ScheduleError(
                f"the checkpoint's scheduler sets {option}; grids are reproduced for plain and "
                "shifted flow matching only. Load the pipeline with that option off"
            )
    mu, tokens = None, None
    if config.get("use_dynamic_shifting"):
        if image_tokens is None:
            raise ScheduleError("dynamic shifting depends on the image size; give height and width")
        if mu_rule == "line":
            mu = dynamic_mu(config, image_tokens)
        else:
            tokens = image_tokens
    is_unipc = config.get("_class_name") == FLOW_SIGMAS_SCHEDULER
    if is_unipc:
        check_flow_sigmas(config, convention)
    has_flow_sigmas = is_unipc or config.get("has_unipc_grid", False)
    return make_grid(
        steps,
        convention="flow_sigmas" if has_flow_sigmas else convention,
        shift=config.get("flow_shift" if is_unipc else "shift", 1.0),
        mu=mu,
        time_shift_type=config.get("time_shift_type", "exponential"),
        shift_terminal=config.get("shift_terminal"),
        sigma_min=sigma_min,
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        height=height,
        width=width,
        frames=frames,
        image_tokens=tokens,
        second_stage=second_stage,
    )


def check_flow_sigmas(config: Mapping[str, Any], convention: Convention = "count") -> None:
    """Raise `ScheduleError` unless a UniPCMultistepScheduler's configuration has flow sigmas.

    They end at 0, and are made of the number of steps alone.
    """
    expected = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "final_sigmas_type": "zero",
        **dict.fromkeys(_UNSUPPORTED, False),
    }
    found = {**expected, "use_flow_sigmas": None, "prediction_type": None, **config}
    wrong = [f"{key} {found[key]!r}" for key in expected if (found[key] or False) != expected[key]]
    if wrong or convention != "count":
        raise ScheduleError(
            f"expected a {FLOW_SIGMAS_SCHEDULER} of flow matching, as Wan's, in a pipeline that "
            "gives it the number of steps alone (use_flow_sigmas, prediction_type flow_prediction, "
            f"final_sigmas_type zero), found {', '.join(wrong) or 'one that is given sigmas'}; "
            "give the pipeline a FlowMatchEulerDiscreteScheduler"
        )


def dynamic_mu(config: Mapping[str, Any], image_tokens: int) -> float:
    """Shift for an image of `image_tokens` packed tokens: a line through two published points."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (high - low)
    return float(image_tokens * slope + (base - slope * low))


def empirical_mu(image_tokens: int, steps: int) -> float:
    """Shift for an image of `image_tokens` packed tokens in so many steps, as FLUX.2 has it.

    Source: `compute_empirical_mu` of diffusers 0.42.1 and of Black Forest Labs' own sampling.py: a
    line in the tokens for 10 steps, one for 200, and between them by the steps; above 4300 tokens
    that for 200 alone.
    """
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)
