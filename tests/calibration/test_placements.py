from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.calibration.conftest import FieldSampler

from meancache_trt.calibration.baking import BakeOptions, bake_schedules
from meancache_trt.calibration.placements import PLACEMENTS, get_placement
from meancache_trt.calibration.placements.even import even_nodes
from meancache_trt.calibration.placements.own_grid import own_grid
from meancache_trt.calibration.refit import interval_errors, mean_gram, refit_spans
from meancache_trt.calibration.trajectories import Prompt, Settings, Trajectories, record
from meancache_trt.errors import CalibrationError, ScheduleError
from meancache_trt.meancache.methods import METHODS
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import SecondStage, SigmaGrid, make_grid

BUDGET = 5


def baked(trajectories: Trajectories, method: str, placement: str | None = None) -> Schedule:
    options = BakeOptions(method=method, placement=placement)
    (schedule,) = bake_schedules(trajectories, [BUDGET], options)
    return schedule


def test_every_method_names_a_placement_that_there_is() -> None:
    assert {method.placement for method in METHODS.values()} <= PLACEMENTS.keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_method_can_be_placed_in_every_way(
    trajectories: Trajectories, method: str, placement: str
) -> None:
    schedule = baked(trajectories, method, placement)
    assert schedule.budget == BUDGET
    label = method if METHODS[method].placement == placement else f"{method}-{placement}"
    assert schedule.name == f"{label}-b{BUDGET}"
    again = bake(method, schedule.grid, schedule.nodes, schedule.spans)
    assert schedule.weights == again.weights


@pytest.mark.parametrize(
    ("method", "placement"),
    [
        ("official", "path"),
        ("paper", "path"),
        ("euler", "path"),
        ("threshold", "change"),
        ("lemica", "minimax"),
        ("taylor1", "even"),
        ("taylor2", "even"),
        ("ab2", "own-grid"),
        ("dpmpp2m", "own-grid"),
        ("unipc", "own-grid"),
    ],
)
def test_the_usual_placement_is_the_methods_own(
    trajectories: Trajectories, method: str, placement: str
) -> None:
    usual, named = baked(trajectories, method), baked(trajectories, method, placement)
    assert (usual.name, usual.grid, usual.nodes, usual.spans) == (
        named.name,
        named.grid,
        named.nodes,
        named.spans,
    )


@given(steps=st.integers(1, 60), data=st.data())
def test_even_nodes_differ_by_at_most_one_step(steps: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, steps))
    nodes = even_nodes(steps, budget)
    assert (len(nodes), nodes[0]) == (budget, 0)
    widths = [end - start for start, end in itertools.pairwise((*nodes, steps))]
    assert max(widths) - min(widths) <= 1
    assert min(widths) >= 1


GRIDS: list[dict[str, Any]] = [
    {"shift": 3.0},
    {"mu": 0.9},
    {"image_tokens": 1024},
    {"mu": 0.9, "time_shift_type": "linear", "shift_terminal": 0.02},
    {"convention": "linspace_to_zero", "shift": 7.0, "frames": 9},
    {"convention": "count", "shift": 3.0, "num_train_timesteps": 500},
    {"height": 64, "width": 96},
    {"second_stage": SecondStage(boundary_timestep=875.0, guidance_scale=3.0)},
]


@pytest.mark.parametrize("made_with", GRIDS)
def test_an_own_grid_is_made_as_the_recorded_one_was(made_with: dict[str, Any]) -> None:
    recorded = make_grid(20, **made_with)
    for steps in (1, 2, 7, 19, 20, 30):
        if steps == 1 and "shift_terminal" in made_with:
            continue  # a grid whose only sigma is 1 cannot end elsewhere
        assert own_grid(recorded, steps) == make_grid(steps, **made_with)


@pytest.mark.parametrize(
    "grid",
    [
        make_grid(4, convention="custom", sigmas=[1.0, 0.7, 0.5, 0.1]),
        make_grid(8, convention="count", sigma_min=0.1),
        msgspec.structs.replace(make_grid(8), shift=3.0),
    ],
)
def test_a_grid_of_unknown_making_has_no_own_grid_of_other_steps(grid: SigmaGrid) -> None:
    with pytest.raises(CalibrationError, match=r"made with 3 steps.*found one of '.*even"):
        own_grid(grid, 3)


@pytest.mark.parametrize("method", ["euler", "unipc", "official"])
def test_on_an_own_grid_every_step_is_evaluated(trajectories: Trajectories, method: str) -> None:
    schedule = baked(trajectories, method, "own-grid")
    own = make_grid(BUDGET, shift=3.0)
    assert (schedule.grid, schedule.nodes) == (own, tuple(range(BUDGET)))
    assert schedule.spans == ((1,) * (BUDGET - 1) if method == "official" else None)
    assert schedule.fit_to(own, 3.5) is schedule
    with pytest.raises(ScheduleError, match=r"calibrated on another grid: 5 steps against 12"):
        schedule.fit_to(trajectories.grid, 3.5)


@pytest.mark.parametrize("method", ["ab2", "taylor1", "dpmpp2m", "lemica"])
def test_a_method_without_edge_costs_takes_the_path_of_plain_reuse(
    trajectories: Trajectories, method: str
) -> None:
    schedule, reuse = baked(trajectories, method, "path"), baked(trajectories, "euler")
    assert schedule.nodes == reuse.nodes
    evidence = schedule.calibration
    assert evidence is not None
    gram, sigmas = mean_gram(trajectories), trajectories.grid.array()
    errors = interval_errors(gram, sigmas, schedule.nodes, schedule.weights)
    np.testing.assert_allclose(evidence.edge_costs, errors, atol=1e-9)  # roots of rounding
    assert evidence.path_cost == pytest.approx((errors**evidence.gamma).sum())


def test_lemica_lowers_the_worst_edge_and_not_the_sum(trajectories: Trajectories) -> None:
    for budget in range(1, 13):
        (lemica,) = bake_schedules(trajectories, [budget], BakeOptions("lemica"))
        (least_sum,) = bake_schedules(trajectories, [budget], BakeOptions("euler", gamma=1.0))
        ours, theirs = lemica.calibration, least_sum.calibration
        assert ours is not None
        assert theirs is not None
        assert max(ours.edge_costs or ()) <= max(theirs.edge_costs or ())
        assert ours.path_cost == pytest.approx(sum(ours.edge_costs or ()))
        # sums of the same costs in another order
        assert (ours.path_cost or 0) >= (theirs.path_cost or 0) * (1 - 1e-12)


@pytest.mark.parametrize("placement", ["even", "change"])
def test_spans_of_given_nodes_are_those_that_err_least(
    trajectories: Trajectories, placement: str
) -> None:
    schedule = baked(trajectories, "official", placement)
    longest = BakeOptions().max_span
    gram, sigmas = mean_gram(trajectories), trajectories.grid.array()
    assert schedule.spans == refit_spans("official", gram, sigmas, schedule.nodes, longest)


def test_one_evaluation_is_one_step_however_it_is_placed(trajectories: Trajectories) -> None:
    for method, placement in itertools.product(METHODS, PLACEMENTS):
        options = BakeOptions(method=method, placement=placement)
        (schedule,) = bake_schedules(trajectories, [1], options)
        assert schedule.weights == ((-1.0,),)


def test_an_unknown_placement_lists_the_known_ones() -> None:
    with pytest.raises(CalibrationError, match=r"'evn'; expected one of path, minimax, change"):
        get_placement("evn")


def test_fitted_schedules_take_no_placement(trajectories: Trajectories) -> None:
    with pytest.raises(CalibrationError, match="choose their own nodes, found placement 'even'"):
        bake_schedules(trajectories, [4], BakeOptions("fitted", placement="even"))


def test_a_recording_over_custom_sigmas_can_be_placed_on_its_own_steps_only(
    tmp_path: Path,
) -> None:
    grid = make_grid(4, convention="custom", sigmas=[1.0, 0.7, 0.5, 0.1])
    made = record(tmp_path, Settings(grid=grid), FieldSampler(grid), [Prompt("a ring")])
    with pytest.raises(CalibrationError, match="another placement"):
        bake_schedules(made, [2], BakeOptions("unipc"))
    (schedule,) = bake_schedules(made, [2], BakeOptions("unipc", placement="even"))
    assert (schedule.grid, schedule.nodes) == (grid, (0, 2))
