"""What is left of a schedule that begins midway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.methods import METHODS, get_method
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import SecondStage, make_grid
from meancache_trt.meancache.strength import begin_at, first_step

STEPS = 20
GRID = make_grid(STEPS, shift=3.0)
NODES, SPANS = (0, 1, 3, 7, 12, 15), (1, 2, 3, 5, 8)

EXACT = 1e-15  # a few float64 roundings of numbers up to 1


def analytic(method: str) -> Schedule:
    return bake(method, GRID, NODES, SPANS if get_method(method).uses_spans else None)


def fitted() -> Schedule:
    """Rows over up to three velocities, whose sums are sigma differences."""
    (*widths,) = np.diff(analytic("euler").sigmas())
    shares = ((1.0,), (0.7, 0.3), (0.8, 0.1, 0.1), (0.6, 0.3, 0.1), (0.9, 0.1), (1.2, -0.3, 0.1))
    rows = tuple(
        tuple(float(width) * share for share in row)
        for width, row in zip(widths, shares, strict=True)
    )
    return Schedule(name="fit", grid=GRID, method="fitted", nodes=NODES, history=3, weights=rows)


SCHEDULES = {**{name: analytic(name) for name in METHODS}, "fitted": fitted()}


def sums(schedule: Schedule) -> NDArray[np.float64]:
    return np.array([math.fsum(row) for row in schedule.weights])


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(0, STEPS - 1),
)
def test_every_row_moves_from_its_node_to_the_next_and_ends_at_the_end(
    name: str, step: int
) -> None:
    rest = begin_at(SCHEDULES[name], step)
    kept = [node for node in NODES if node >= step]
    assert [step + node for node in rest.nodes] == ([] if step in kept else [step]) + kept
    sigmas = np.append(GRID.array()[[step + node for node in rest.nodes]], GRID.sigmas[-1])
    assert np.array_equal(rest.sigmas(), sigmas)
    assert rest.timesteps()[0] == GRID.timesteps[step]
    # weights of up to some 20 that cancel, in float64
    np.testing.assert_allclose(sums(rest), np.diff(sigmas), rtol=0, atol=20 * EXACT)


def test_a_whole_schedule_is_left_as_it_is() -> None:
    for schedule in SCHEDULES.values():
        assert begin_at(schedule, 0) is schedule


@pytest.mark.parametrize("step", range(STEPS))
def test_every_step_evaluated_is_euler_from_there_on(step: int) -> None:
    rest = begin_at(bake("official", GRID, range(STEPS), (1,) * (STEPS - 1)), step)
    assert rest.weights == tuple((float(width),) for width in np.diff(GRID.array()[step:]))


@pytest.mark.parametrize("step", [2, 3, 5, 7])
def test_taylor_is_exact_for_a_velocity_linear_in_the_step_once_it_has_two(step: int) -> None:
    """A node before the first skipped step makes the first forecast exact as well."""
    nodes = (0, step, step + 1, 12, 15)
    rest = begin_at(bake("taylor1", GRID, nodes), step)
    steps = np.arange(step, STEPS)
    velocities = 0.25 - 0.125 * steps
    expected = np.sum(np.diff(GRID.array()[step:]) * velocities)
    found = integrate(rest, [velocities[node] for node in rest.nodes])
    assert found == pytest.approx(expected, abs=20 * EXACT)


def integrate(schedule: Schedule, velocities: Sequence[float]) -> float:
    """The displacement that the rows make of the velocities at the nodes."""
    moves = [
        weight * velocities[n - age]
        for n, row in enumerate(schedule.weights)
        for age, weight in enumerate(row)
    ]
    return math.fsum(moves)


def authors_rule(step: int, spans: dict[int, int], velocities: dict[int, float]) -> float:
    """The recursion of the authors' scripts from `step` on, estimate by estimate."""
    sigmas, x, v, span = GRID.array(), {step: 0.0}, dict[int, float](), 1
    for i in range(step, STEPS):
        h = sigmas[i + 1] - sigmas[i]
        if i in velocities:
            v[i], span = velocities[i], spans.get(i, 1)
        else:
            start = max(i - span, step)
            w = sigmas[i] - sigmas[start]
            v[i] = v[i - 1] + h * ((x[i] - x[start]) / w - v[start]) / w
        x[i + 1] = x[i] + h * v[i]
    return float(x[STEPS])


@pytest.mark.parametrize("step", [1, 2, 3, 6, 9, 13, 17])
def test_official_rows_are_the_authors_rule_begun_there(step: int) -> None:
    rest = begin_at(analytic("official"), step)
    generator = np.random.default_rng(step)
    velocities = {step + node: float(generator.normal()) for node in rest.nodes}
    # a span reaches no further back than the first step, where a node has one step of history
    spans = {
        node: min(span, node - step + 1)
        for node, span in zip(NODES[:-1], SPANS, strict=True)
        if node >= step
    }
    expected = authors_rule(step, spans, velocities)
    found = integrate(rest, list(velocities.values()))
    # quotients of differences of float64 sigmas, over some ten steps
    assert found == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_a_fitted_table_keeps_the_rows_that_read_nothing_from_before() -> None:
    whole = fitted()
    widths = np.diff(whole.sigmas())
    at_node = begin_at(whole, 3)
    assert at_node.nodes == (0, 4, 9, 12)
    assert at_node.weights == (
        (widths[2],),  # read two velocities from before
        (widths[3],),  # read one
        whole.weights[4],
        whole.weights[5],
    )
    assert at_node.history == 3


def test_a_fitted_row_does_not_read_the_velocity_of_an_added_node() -> None:
    whole = fitted()
    between = begin_at(whole, 5)
    assert between.nodes == (0, 2, 7, 10)
    euler = np.diff(between.sigmas())
    assert between.weights[0] == (euler[0],)
    assert between.weights[1] == (euler[1],)  # read the velocities of steps 3 and 1
    assert between.weights[2:] == whole.weights[4:]


def test_zeros_at_the_end_of_a_fitted_row_read_nothing() -> None:
    rows = ((-0.5,), (-0.2, 0.0), (-0.3, 0.0, 0.0))
    table = Schedule(
        name="fit", grid=GRID, method="fitted", nodes=(0, 4, 9), history=3, weights=rows
    )
    assert begin_at(table, 4).weights == ((-0.2,), (-0.3, 0.0))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_beginning_after_the_last_node_is_one_evaluation(name: str) -> None:
    rest = begin_at(SCHEDULES[name], 17)
    assert rest.nodes == (0,)
    assert rest.weights == ((GRID.sigmas[-1] - GRID.sigmas[17],),)


def test_what_the_schedule_belongs_to_is_kept_and_its_evidence_is_not() -> None:
    whole = bake(
        "euler",
        GRID,
        NODES,
        name="b6",
        family="flux",
        guidance_scale=3.5,
        precision="bfloat16",
        calibration=Evidence(samples=1, seconds=0.0),
    )
    rest = begin_at(whole, 4)
    kept = (rest.name, rest.family, rest.guidance_scale, rest.precision)
    assert kept == ("b6", "flux", 3.5, "bfloat16")
    assert rest.calibration is None


@given(st.integers(1, 100), st.floats(0.011, 1.0))
def test_the_first_step_is_diffusers(steps: int, strength: float) -> None:
    pipeline: Any = SimpleNamespace(
        scheduler=SimpleNamespace(timesteps=torch.zeros(steps), order=1)
    )
    _, remaining = FluxImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    assert first_step(steps, strength) == steps - remaining


@pytest.mark.parametrize(
    ("steps", "strength", "step"),
    [(50, 1.0, 0), (50, 1, 0), (50, 0.6, 20), (50, 0.58, 21), (50, 0.001, 49), (1, 0.5, 0)],
)
def test_the_first_step_of_a_strength(steps: int, strength: float, step: int) -> None:
    assert first_step(steps, strength) == step


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_a_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(ScheduleError, match=f"above 0 and at most 1, found {strength}"):
        first_step(50, strength)


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    # 50 − 50e-18 is 50 in float64; any larger part of a step is a step
    with pytest.raises(ScheduleError, match=r"leaves none of 50 steps; 0\.02 leaves one"):
        first_step(50, 1e-18)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_left_has_the_transformers_of_its_nodes(name: str) -> None:
    stage = SecondStage(boundary_timestep=800.0)
    grid = msgspec.structs.replace(GRID, second_stage=stage)
    whole = msgspec.structs.replace(SCHEDULES[name], grid=grid)
    for step in (1, 3, 8):
        left = begin_at(whole, step)
        assert left.grid.second_stage == stage
        expected = [
            "transformer" if GRID.timesteps[step + node] >= 800 else "transformer_2"
            for node in left.nodes
        ]
        assert left.transformers() == tuple(expected)
