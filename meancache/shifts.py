"""How diffusers' flow-matching schedulers shift sigmas, each step in their element type."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import ScheduleError

TimeShift = Literal["exponential", "linear"]

LARGEST_MU = 80.0
"""exp(mu) stays a float32 below this; published models have mu below 2."""

_BELOW_ONE = 1e-6  # UniPCMultistepScheduler.set_timesteps, because λ has to be finite


def shifted(
    sigmas: NDArray[np.floating],
    shift: float,
    mu: float | None,
    form: TimeShift,
    terminal: float | None,
) -> NDArray[np.floating]:
    """Sigmas (T,) moved by `mu`, where that is None by `shift`, and stretched to `terminal`."""
    if mu is None:
        moved: NDArray[np.floating] = sigmas * shift / (1 + (shift - 1) * sigmas)
    else:
        moved = _moved(sigmas, mu, form)
    return _stretched(moved, terminal) if terminal else moved


def exact_timesteps(
    sigmas: NDArray[np.floating], num_train_timesteps: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Sigmas and timesteps as FlowMatchEulerDiscreteScheduler has them."""
    values = sigmas.astype(np.float32)
    return values, values * np.float32(num_train_timesteps)


def whole_timesteps(
    sigmas: NDArray[np.floating], num_train_timesteps: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Sigmas and timesteps as UniPCMultistepScheduler has them: cut to whole numbers."""
    below = np.array(sigmas)
    below[0] -= _BELOW_ONE if abs(below[0] - 1) < _BELOW_ONE else 0
    return below.astype(np.float32), np.trunc(below * num_train_timesteps).astype(np.float32)


def counted(
    steps: int, training_shift: float, sigma_min: float | None, num_train_timesteps: int
) -> NDArray[np.floating]:
    """Evenly spaced sigmas over the training grid, which diffusers shifts at construction too."""
    low, high = _training_range(training_shift, num_train_timesteps)
    low = low if sigma_min is None else sigma_min
    ends = high * num_train_timesteps, low * num_train_timesteps
    return np.linspace(*ends, steps) / num_train_timesteps


def _training_range(shift: float, num_train_timesteps: int) -> tuple[float, float]:
    """Lowest and highest sigma of the shifted training grid, in float32."""
    ends = np.array([1, num_train_timesteps], np.float32) / np.float32(num_train_timesteps)
    ends = shift * ends / (1 + (shift - 1) * ends)
    return float(ends[0]), float(ends[1])


def _moved(sigmas: NDArray[np.floating], mu: float, form: TimeShift) -> NDArray[np.floating]:
    scale = math.exp(mu) if form == "exponential" else mu
    with np.errstate(divide="ignore"):  # sigma 0 goes through infinity and stays 0
        moved: NDArray[np.floating] = scale / (scale + (1 / sigmas - 1) ** 1.0)
    return moved


def _stretched(sigmas: NDArray[np.floating], terminal: float) -> NDArray[np.floating]:
    """Stretch the grid, with sigma 1 fixed, so that its last sigma is `terminal`."""
    remaining = 1 - sigmas
    if remaining[-1] <= 0:
        raise ScheduleError(
            f"shift_terminal moves the last step to sigma {terminal}, found a grid whose last step "
            "is at sigma 1; use two steps or more"
        )
    stretched: NDArray[np.floating] = 1 - remaining / (remaining[-1] / (1 - terminal))
    return stretched


def check_shifts(
    shift: float, mu: float | None, form: TimeShift, shift_terminal: float | None
) -> None:
    """Raise `ScheduleError` for shifts that no scheduler can follow."""
    positive = shift if mu is None else mu if form == "linear" else 1.0
    if not 0 < positive < math.inf:
        raise ScheduleError(f"a shift is positive and finite, found {positive}; 1 leaves the grid")
    if mu is not None and not abs(mu) <= LARGEST_MU:
        raise ScheduleError(
            f"mu is at most {LARGEST_MU} either way, found {mu}; FLUX uses 0.5 to 1.15"
        )
    if shift_terminal and not 0 < shift_terminal < 1:
        raise ScheduleError(
            f"shift_terminal is a sigma between 0 and 1, found {shift_terminal}; Qwen-Image has .02"
        )
