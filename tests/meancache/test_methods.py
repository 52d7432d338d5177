"""Every method against its own recursion, written out step by step on real velocities.

The functions named `unfolded_*` share nothing with the package: they are the published rules, run
on latents. The package folds the same rules into weights before any network runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.meancache.unfolded_solvers import unfolded_dpmpp2m, unfolded_unipc

from meancache_trt.meancache.folding import Rows
from meancache_trt.meancache.methods import METHODS, get_method
from meancache_trt.meancache.presets import preset, preset_names
from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import make_grid

Array = NDArray[Any]
Field = Callable[[Array, float], Array]

quick = settings(max_examples=80, deadline=None)


@dataclass(frozen=True)
class Problem:
    sigmas: NDArray[np.float64]
    nodes: tuple[int, ...]
    spans: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def span_at(self, node: int) -> int:
        return (*self.spans, 1)[self.nodes.index(node)]


@st.composite
def problems(draw: st.DrawFn, max_steps: int = 40) -> Problem:
    """Uneven grids (gaps up to 8 to 1), any nodes, any legal spans; the last sigma may repeat."""
    gaps = np.array(draw(st.lists(st.floats(0.125, 1.0), min_size=2, max_size=max_steps)))
    sigmas = np.append(1 - np.cumsum(np.append(0.0, gaps / gaps.sum()))[:-1], 0.0)
    if draw(st.booleans()):
        sigmas = np.append(sigmas, 0.0)
    others = draw(st.sets(st.integers(1, len(sigmas) - 2)))
    nodes = (0, *sorted(others))
    spans = tuple(draw(st.integers(1, node + 1)) for node in nodes[:-1])
    return Problem(sigmas, nodes, spans)


RNG = np.random.default_rng(20260119)
INNER, OUTER = RNG.normal(size=(2, 6, 6)) / 3
START = RNG.normal(size=6)


def nonlinear(latent: Array, sigma: float) -> Array:
    """Bends in the latent and in sigma; grows at most linearly, so that no run diverges."""
    return np.asarray(
        np.tanh(INNER @ latent * (1 + 3 * sigma)) + OUTER @ latent * np.sin(6 * sigma)
    )


def integrate(rows: Rows, problem: Problem, field: Field, start: Array = START) -> Array:
    velocities: list[Array] = []
    latent = start
    for row, node in zip(rows, problem.nodes, strict=True):
        velocities.insert(0, field(latent, problem.sigmas[node]))
        latent = latent + sum(w * v for w, v in zip(row, velocities, strict=False))
    return latent


def unfolded_euler(problem: Problem, field: Field, start: Array = START) -> Array:
    latent, velocity = start, start
    for i in range(problem.steps):
        if i in problem.nodes:
            velocity = field(latent, problem.sigmas[i])
        latent = latent + (problem.sigmas[i + 1] - problem.sigmas[i]) * velocity
    return latent


def unfolded_official(problem: Problem, field: Field, start: Array = START) -> Array:
    """The authors' scripts: v̂_i = v_{i−1} − h·JVP, JVP = (v_{i0} − mean velocity) / W."""
    sigmas, latents = problem.sigmas, [start]
    velocities: list[Array] = []
    span = 1
    for i in range(problem.steps):
        if i in problem.nodes:
            span = problem.span_at(i)
            velocity = field(latents[i], sigmas[i])
        else:
            window_start = i - min(span, i)
            window = sigmas[i] - sigmas[window_start]
            mean = (latents[i] - latents[window_start]) / window
            jvp = (velocities[window_start] - mean) / window
            velocity = velocities[i - 1] - (sigmas[i + 1] - sigmas[i]) * jvp
        velocities.append(velocity)
        latents.append(latents[i] + (sigmas[i + 1] - sigmas[i]) * velocity)
    return latents[-1]


def unfolded_paper(problem: Problem, field: Field, start: Array = START) -> Array:
    """One jump an edge, z_s = z_t + (s − t)·(v_t + (s − t)·JVP); straight lines in between."""
    sigmas = problem.sigmas
    latents, velocities = {0: start}, {}
    for t, s in zip(problem.nodes, (*problem.nodes[1:], problem.steps), strict=True):
        velocities[t] = field(latents[t], sigmas[t])
        r = max(t - problem.span_at(t), 0)
        jvp = np.zeros_like(start)
        if t - r > 1 and s - t > 1:
            past = sigmas[t] - sigmas[r]
            jvp = ((latents[t] - latents[r]) / past - velocities[r]) / past
        average = velocities[t] + (sigmas[s] - sigmas[t]) * jvp
        for i in range(t + 1, s + 1):
            latents[i] = latents[t] + (sigmas[i] - sigmas[t]) * average
            velocities[i] = average
    return latents[problem.steps]


def unfolded_ab2(problem: Problem, field: Field, start: Array = START) -> Array:
    """x += h·v + h²/(2 h_before)·(v − v_before), variable steps."""
    latent, before, h_before = start, start, math.nan
    ends = (*problem.nodes[1:], problem.steps)
    for n, (node, end) in enumerate(zip(problem.nodes, ends, strict=True)):
        velocity = field(latent, problem.sigmas[node])
        h = problem.sigmas[end] - problem.sigmas[node]
        slope = (velocity - before) / h_before if n else np.zeros_like(velocity)
        latent = latent + h * velocity + h**2 / 2 * slope
        before, h_before = velocity, h
    return latent


def unfolded_taylor(order: int) -> Callable[[Problem, Field], Array]:
    """TaylorSeer on the velocity: Σ_k D^k·(i − node)^k / k!, D by differences of D at nodes."""

    def run(problem: Problem, field: Field, start: Array = START) -> Array:
        latent = start
        derivatives: list[Array] = []
        last = 0
        for i in range(problem.steps):
            if i in problem.nodes:
                fresh = [field(latent, problem.sigmas[i])]
                for k in range(min(order, len(derivatives))):
                    fresh.append((fresh[k] - derivatives[k]) / (i - last))
                derivatives, last = fresh, i
            forecast = np.zeros_like(start)
            for k, derivative in enumerate(derivatives):
                forecast = forecast + derivative * (i - last) ** k / math.factorial(k)
            latent = latent + (problem.sigmas[i + 1] - problem.sigmas[i]) * forecast
        return latent

    return run


def on_nodes(solver: Callable[[Array, Field, Array], Array]) -> Callable[[Problem, Field], Array]:
    def run(problem: Problem, field: Field, start: Array = START) -> Array:
        return solver(problem.sigmas[[*problem.nodes, -1]], field, start)

    return run


UNFOLDED: dict[str, Callable[[Problem, Field], Array]] = {
    "euler": unfolded_euler,
    "threshold": unfolded_euler,
    "lemica": unfolded_euler,
    "official": unfolded_official,
    "paper": unfolded_paper,
    "ab2": unfolded_ab2,
    "dpmpp2m": on_nodes(unfolded_dpmpp2m),
    "unipc": on_nodes(unfolded_unipc),
    "taylor1": unfolded_taylor(1),
    "taylor2": unfolded_taylor(2),
}


def fold(name: str, problem: Problem) -> Rows:
    method = get_method(name)
    return method.fold(problem.sigmas, problem.nodes, problem.spans if method.uses_spans else None)


def gap(name: str, problem: Problem) -> float:
    """Largest difference between folded and unfolded, over the size of what is added up."""
    rows = fold(name, problem)
    size = 1 + sum(abs(weight) for row in rows for weight in row)
    found = integrate(rows, problem, nonlinear)
    expected = UNFOLDED[name](problem, nonlinear)
    return float(np.abs(found - expected).max() / max(size, np.abs(expected).max()))


def test_every_method_has_an_oracle() -> None:
    assert UNFOLDED.keys() == METHODS.keys()


@quick
@pytest.mark.parametrize("name", METHODS)
@given(problem=problems())
def test_folded_equals_unfolded(name: str, problem: Problem) -> None:
    # Float64 rounding of at most 40 steps; wide extrapolation has large weights of either sign,
    # so the bound is relative to them.
    assert gap(name, problem) <= 1e-12


@pytest.mark.parametrize("name", preset_names())
def test_published_schedules_equal_the_authors_recursion(name: str) -> None:
    schedule = preset(name)
    assert schedule.spans is not None
    problem = Problem(schedule.grid.array(), schedule.nodes, schedule.spans)
    found = integrate(schedule.weights, problem, nonlinear)
    # Rounding of 50 steps on values of order 1; measured 4e-15.
    np.testing.assert_allclose(found, unfolded_official(problem, nonlinear), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("method", METHODS)
def test_every_method_folds_on_published_nodes(method: str, name: str) -> None:
    schedule = preset(name)
    assert schedule.spans is not None
    problem = Problem(schedule.grid.array(), schedule.nodes, schedule.spans)
    assert gap(method, problem) <= 1e-12  # as above


@quick
@pytest.mark.parametrize("name", METHODS)
@given(problem=problems())
def test_rows_sum_to_the_interval(name: str, problem: Problem) -> None:
    ends = problem.sigmas[[*problem.nodes[1:], -1]]
    for row, end, node in zip(fold(name, problem), ends, problem.nodes, strict=True):
        # Rounding of a sum over weights that may cancel.
        tolerance = 1e-13 * (1 + sum(map(abs, row)))
        assert sum(row) == pytest.approx(end - problem.sigmas[node], abs=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_constant_field_is_exact(name: str) -> None:
    problem = Problem(make_grid(30, shift=3.0).array(), (0, 1, 4, 9, 10, 20), (1, 2, 3, 4, 5))
    velocity = np.array([2.0, -1.0])
    found = integrate(fold(name, problem), problem, lambda _x, _s: velocity, np.zeros(2))
    np.testing.assert_allclose(found, -velocity, rtol=1e-14)  # rounding of six updates


# Solvers are left out: they integrate the differential equation, not the T Euler steps, and with
# every step evaluated they are the textbook rule (next test, and test_solvers.py).
SOLVERS = ("ab2", "dpmpp2m", "unipc")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SOLVERS])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("convention", ["linspace", "count"])
def test_all_steps_evaluated_is_euler_to_the_bit(name: str, dtype: Any, convention: Any) -> None:
    grid = make_grid(17, shift=3.0, convention=convention, sigma_min=0.0)
    spans = [min(3, step + 1) for step in range(16)] if METHODS[name].uses_spans else None
    schedule = bake(name, grid, range(17), spans)
    sigmas = grid.array().astype(dtype)
    start, mixing = START.astype(dtype), OUTER.astype(dtype)
    expected = found = start
    for step in range(17):
        expected = expected + (sigmas[step + 1] - sigmas[step]) * np.sin(mixing @ expected)
        weights = schedule.table(1)[step] if dtype is np.float32 else schedule.weights[step]
        assert len(weights) == 1
        found = found + dtype(weights[0]) * np.sin(mixing @ found)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_ab2_with_even_steps_has_the_textbook_weights() -> None:
    rows = get_method("ab2").fold(np.linspace(1, 0, 9), range(8))
    np.testing.assert_allclose(rows[0], [-1 / 8], rtol=1e-15)
    for row in rows[1:]:
        np.testing.assert_allclose(row, [-3 / 16, 1 / 16], rtol=1e-14)  # rounding of the widths


def slope(errors: Sequence[float], sizes: Sequence[int]) -> float:
    return float(-np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def closed_form(latent: Array, sigma: float) -> Array:
    """dx/dσ = 3 cos(3σ)·x, so that x(0) = x(1)·exp(−sin 3)."""
    return np.asarray(3 * np.cos(3 * sigma) * latent)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_convergence_to_the_exact_solution(name: str, order: int) -> None:
    sizes = [32, 64, 128, 256]
    errors = []
    for budget in sizes:
        problem = Problem(np.linspace(1, 0, budget + 1), tuple(range(budget)), ())
        found = integrate(fold(name, problem), problem, closed_form, np.ones(1))
        errors.append(abs(found[0] - math.exp(-math.sin(3))))
    # Four doublings; the next order of the error is below a tenth at these sizes.
    assert slope(errors, sizes) == pytest.approx(order, abs=0.1)


# Against the T-step Euler solution that every method replaces. TaylorSeer's higher derivatives are
# backward differences used as if they were centred, so its order stays 2 for every k >= 1.
@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler", 1),
        ("threshold", 1),
        ("lemica", 1),
        ("official", 1),
        ("taylor1", 2),
        ("taylor2", 2),
    ],
)
def test_order_of_convergence_to_all_steps(name: str, order: int) -> None:
    steps, sizes = 4096, [64, 128, 256]
    sigmas = np.linspace(1, 0, steps + 1)
    everything = Problem(sigmas, tuple(range(steps)), ())
    reference = integrate(fold("euler", everything), everything, closed_form, np.ones(1))
    errors = []
    for budget in sizes:
        stride = steps // budget
        nodes = tuple(range(0, steps, stride))
        spans = tuple(min(node + 1, stride) for node in nodes[:-1])
        problem = Problem(sigmas, nodes, spans)
        errors.append(
            abs(integrate(fold(name, problem), problem, closed_form, np.ones(1)) - reference)[0]
        )
    # T >= 16 B, so an interval is nearly continuous; measured within 0.08 of the order.
    assert slope(errors, sizes) == pytest.approx(order, abs=0.15)


def linear_in_sigma(_latent: Array, sigma: float) -> Array:
    return np.array([1.0 + 2.0 * sigma])


def test_taylor_is_exact_where_the_velocity_is_linear_in_the_step() -> None:
    problem = Problem(np.linspace(1, 0, 21), (0, 1, 5, 6, 13), ())
    expected = unfolded_euler(Problem(problem.sigmas, tuple(range(20)), ()), linear_in_sigma)
    for name in ("taylor1", "taylor2"):
        found = integrate(fold(name, problem), problem, linear_in_sigma)
        np.testing.assert_allclose(found, expected, rtol=1e-13)  # rounding of 20 steps


def test_ab2_is_exact_where_the_velocity_is_linear_in_sigma() -> None:
    sigmas = np.array([1.0, 0.9, 0.55, 0.5, 0.2, 0.0])
    problem = Problem(sigmas, (0, 1, 2, 3, 4), ())
    first = -0.1 * linear_in_sigma(START, 1.0)  # Euler, since there is no history yet
    rest = -(0.9 + 0.9**2)  # the integral of 1 + 2σ from 0.9 to 0
    found = integrate(fold("ab2", problem), problem, linear_in_sigma, np.zeros(1))
    np.testing.assert_allclose(found, first + rest, rtol=1e-14)  # rounding of five steps


@pytest.mark.parametrize("span", [2, 3, 6])
def test_paper_jump_is_exact_over_an_edge_as_long_as_its_evaluated_window(span: int) -> None:
    """On a linear velocity the past window then has the same mean slope as the edge ahead."""
    nodes = (*range(span + 1), 2 * span)
    problem = Problem(np.linspace(1, 0, 2 * span + 2), nodes, (*[1] * span, span))
    everything = Problem(problem.sigmas, tuple(range(2 * span + 1)), ())
    expected = unfolded_euler(everything, linear_in_sigma)
    found = integrate(fold("paper", problem), problem, linear_in_sigma)
    np.testing.assert_allclose(found, expected, rtol=1e-13)  # rounding of at most 13 steps


def test_paper_jump_is_reuse_where_its_window_starts_at_a_node_before_skipped_steps() -> None:
    """The window's mean is then the last jump itself, and so is the velocity that it is held to."""
    problem = Problem(np.linspace(1, 0, 13), (0, 4, 8), (1, 4))
    for row, width in zip(fold("paper", problem), (4, 4, 4), strict=True):
        # Weights of older velocities cancel up to rounding, which folding drops.
        np.testing.assert_allclose(row, [-width / 12], rtol=1e-13)


def test_official_recursion_takes_a_quarter_of_the_slope_over_two_steps() -> None:
    """Over two evaluated steps h the mean is v_0 + slope·h/2, so v̂_2 − v_1 = slope·h/4."""
    problem = Problem(np.linspace(1, 0, 5), (0, 1, 3), (1, 2))
    rows = fold("official", problem)
    # At step 2 the window is steps 0 and 1: v̂_2 = v_1 + h·((v_0 + v_1)/2 − v_0) / (2h).
    np.testing.assert_allclose(rows[1], [-0.25 * (2 + 0.25), 0.25 * 0.25], rtol=1e-15)
