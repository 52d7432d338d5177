"""Folded solvers against diffusers' own schedulers, on the same sigmas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meancache_trt.meancache.methods import get_method
from meancache_trt.meancache.sigmas import make_grid

# diffusers 0.42.1 hands torch tensors to np.array, which NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Array = NDArray[np.float64]

FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
GENERATOR = torch.Generator().manual_seed(20221102)
MIXING = torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64) / 3
START = torch.randn(1, 6, generator=GENERATOR, dtype=torch.float64)


def dpmpp2m(steps: int) -> DPMSolverMultistepScheduler:
    scheduler = DPMSolverMultistepScheduler(**FLOW, solver_order=2, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(steps)
    return scheduler


def unipc(steps: int) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(**FLOW, solver_order=2, solver_type="bh2")
    scheduler.set_timesteps(steps)
    return scheduler


SCHEDULERS: dict[str, Callable[[int], Any]] = {"dpmpp2m": dpmpp2m, "unipc": unipc}

# On latents of order 1. DPM-Solver++ moves the latent in float32 whatever it is given (measured
# 4e-7 over 3000 grids), UniPC in float64 (5e-14: its weights are differences, over h²).
TOLERANCES = {"dpmpp2m": 2e-6, "unipc": 1e-12}


def nonlinear(latent: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.tanh(latent @ MIXING * (1 + 2 * sigma)) + latent * math.sin(5 * sigma)


def with_scheduler(name: str, sigmas: Array, field: Callable[..., torch.Tensor]) -> Array:
    scheduler = SCHEDULERS[name](len(sigmas) - 1)
    scheduler.sigmas = torch.from_numpy(sigmas)
    scheduler.set_begin_index(0)
    latent = START
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = field(latent, float(sigmas[step]))
        latent = scheduler.step(velocity, timestep, latent, return_dict=False)[0]
    return np.asarray(latent)


def with_rows(name: str, sigmas: Array, field: Callable[..., torch.Tensor]) -> Array:
    latent, past = START, []
    for step, row in enumerate(get_method(name).fold(sigmas, range(len(sigmas) - 1))):
        past.insert(0, field(latent, float(sigmas[step])))
        latent = latent + sum(w * v for w, v in zip(row, past, strict=False))
    return np.asarray(latent)


@st.composite
def levels(draw: st.DrawFn) -> Array:
    """Uneven levels from below 1 to 0, gaps up to 8 to 1."""
    gaps = np.array(draw(st.lists(st.floats(0.125, 1.0), min_size=1, max_size=25)))
    highest = draw(st.floats(0.5, 0.999))
    return np.append(highest * (1 - np.cumsum(np.append(0.0, gaps / gaps.sum()))[:-1]), 0.0)


@pytest.mark.parametrize("name", SCHEDULERS)
@settings(max_examples=60, deadline=None)
@given(sigmas=levels())
def test_rows_do_what_diffusers_scheduler_does(name: str, sigmas: Array) -> None:
    found = with_rows(name, sigmas, nonlinear)
    expected = with_scheduler(name, sigmas, nonlinear)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES[name])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 14, 15, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rows_on_a_models_grid_begin_at_sigma_1(name: str, steps: int, shift: float) -> None:
    """diffusers' UniPC moves from 1 − 1e-6, where its λ is finite; DPM-Solver++ takes the limit."""
    sigmas = make_grid(steps, shift=shift).array()
    theirs = sigmas.copy()
    if name == "unipc":
        theirs[0] = 1 - 1e-6
    found = with_rows(name, sigmas, nonlinear)
    expected = with_scheduler(name, theirs, nonlinear)
    # float32 in the one, and that shorter first step in the other: 1e-6 of velocities of order 3
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def test_the_sigma_below_1_is_that_of_diffusers() -> None:
    scheduler = unipc(4)
    scheduler.set_timesteps(sigmas=np.array([1.0, 0.75, 0.5, 0.25]))
    assert float(scheduler.sigmas[0]) == np.float32(1 - 1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_order_of_convergence_is_2(name: str) -> None:
    """dx/dσ = 3 cos(3σ)·x where λ is finite; ends at σ = 0 and 1 hide the order below B = 500."""
    sizes, errors = [32, 64, 128, 256], []
    exact = START * math.exp(math.sin(0.3) - math.sin(2.7))
    for budget in sizes:
        sigmas = np.linspace(0.9, 0.1, budget + 1)
        found = with_rows(name, sigmas, lambda x, s: 3 * math.cos(3 * s) * x)
        errors.append(np.abs(found - exact.numpy()).max())
    slope = -np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    # four doublings; measured 2.09 and 2.03
    assert slope == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(("name", "history"), [("dpmpp2m", 8), ("unipc", 9)])
def test_rows_read_nearly_all_velocities_but_hardly_the_old(name: str, history: int) -> None:
    rows = get_method(name).fold(make_grid(10, shift=3.0).array(), range(10))
    assert max(map(len, rows)) == history
    for row in rows:
        # measured 0.001 and 0.012: each difference counts a part of the one after it
        assert sum(map(abs, row[4:])) < 0.02 * abs(sum(row))


@pytest.mark.parametrize("name", SCHEDULERS)
@given(steps=st.integers(1, 30), mu=st.floats(0, 12), step=st.integers(0, 29))
@settings(max_examples=50, deadline=None)
def test_rows_are_finite_and_sum_to_the_interval_under_any_shift(
    name: str, steps: int, mu: float, step: int
) -> None:
    """A shift of e^12 puts the first levels within 1e-6 of each other and of 1."""
    sigmas = make_grid(steps, mu=mu).array()[min(step, steps - 1) :]
    rows = get_method(name).fold(sigmas, range(len(sigmas) - 1))
    sums = [math.fsum(row) for row in rows]
    size = max(abs(weight) for row in rows for weight in row)
    # rounding of weights that cancel
    np.testing.assert_allclose(sums, np.diff(sigmas), rtol=0, atol=1e-13 * (1 + size))
