from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from meancache_trt.calibration.baking import BakeOptions, bake_schedules, bakeable_methods
from meancache_trt.calibration.costs import CostRule, measure_costs
from meancache_trt.calibration.path import shortest_path
from meancache_trt.calibration.refit import interval_errors, mean_gram
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.errors import CalibrationError, ScheduleError
from meancache_trt.meancache.methods import METHODS
from meancache_trt.meancache.schedule import bake, load_schedule, save_schedule
from meancache_trt.meancache.sigmas import make_grid


@pytest.mark.parametrize("method", METHODS)
def test_every_budget_gets_a_schedule_of_its_size(trajectories: Trajectories, method: str) -> None:
    budgets = (1, 2, 5, 12)
    schedules = bake_schedules(trajectories, budgets, BakeOptions(method=method))
    assert tuple(schedule.budget for schedule in schedules) == budgets
    for schedule in schedules:
        assert schedule.method == method
        assert schedule.name == f"{method}-b{schedule.budget}"
        analytic = bake(method, schedule.grid, schedule.nodes, schedule.spans)
        assert schedule.weights == analytic.weights


def test_a_schedule_carries_its_settings_and_evidence(
    trajectories: Trajectories, tmp_path: Path
) -> None:
    options = BakeOptions(method="official", gamma=2.0, max_span=3)
    (schedule,) = bake_schedules(trajectories, [4], options)
    assert (schedule.guidance_scale, schedule.family) == (3.5, "flux")
    evidence = schedule.calibration
    assert evidence is not None
    assert (evidence.samples, evidence.network_evaluations, evidence.gamma) == (3, 36, 2.0)
    assert evidence.seconds >= trajectories.seconds > 0
    sigmas = trajectories.grid.array()
    errors = interval_errors(mean_gram(trajectories), sigmas, schedule.nodes, schedule.weights)
    np.testing.assert_allclose(evidence.edge_costs, errors, atol=1e-9)  # square roots of rounding
    assert evidence.path_cost == pytest.approx(sum(np.square(evidence.edge_costs)))
    save_schedule(schedule, tmp_path / "b4.json")
    assert load_schedule(tmp_path / "b4.json") == schedule


def test_without_refit_nodes_and_spans_are_those_of_the_papers_graph(
    trajectories: Trajectories,
) -> None:
    options = BakeOptions("paper", scaling="relative", norm="l1", is_refitted=False)
    (schedule,) = bake_schedules(trajectories, [4], options)
    rule = CostRule("paper", "relative", "l1", options.max_span)
    costs = measure_costs(trajectories, trajectories.grid.array(), rule)
    path = shortest_path(costs.mean, 4, options.gamma)
    assert (schedule.nodes, schedule.spans) == (path.nodes, path.spans)
    assert schedule.calibration is not None
    assert schedule.calibration.edge_costs == costs.along(path.nodes, path.spans)


def test_refitted_spans_err_no_more_than_those_of_the_path(trajectories: Trajectories) -> None:
    gram, sigmas = mean_gram(trajectories), trajectories.grid.array()
    for budget in range(2, 12):
        totals = []
        for is_refitted in (True, False):
            options = BakeOptions("official", is_refitted=is_refitted, max_span=6)
            (found,) = bake_schedules(trajectories, [budget], options)
            errors = interval_errors(gram, sigmas, found.nodes, found.weights)
            totals.append((errors**options.gamma).sum())
        assert totals[0] <= totals[1] * (1 + 1e-9)


def test_a_calibrated_schedule_is_refused_elsewhere(trajectories: Trajectories) -> None:
    (schedule,) = bake_schedules(trajectories, [4], BakeOptions("official"))
    with pytest.raises(ScheduleError, match="calibrated on another grid"):
        schedule.fit_to(make_grid(12, shift=5.0), 3.5)
    with pytest.raises(ScheduleError, match=r"guidance scale 3\.5, found 6\.0"):
        schedule.fit_to(trajectories.grid, 6.0)


def test_more_evaluations_leave_less_error(trajectories: Trajectories) -> None:
    """Euler against the recorded final latent, on the recorded (dense) velocities."""
    schedules = bake_schedules(trajectories, range(1, 13), BakeOptions("euler", gamma=1.0))
    costs = [schedule.calibration.path_cost for schedule in schedules if schedule.calibration]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0.0


@pytest.mark.parametrize("budget", [0, 13])
def test_a_budget_outside_the_grid_is_an_error(trajectories: Trajectories, budget: int) -> None:
    with pytest.raises(CalibrationError, match=f"1 to 12 evaluations on this grid, found {budget}"):
        bake_schedules(trajectories, [4, budget])


def test_every_method_and_the_fitted_one_can_be_baked() -> None:
    assert bakeable_methods() == (*METHODS, "fitted")


def test_an_unknown_method_is_an_error(trajectories: Trajectories) -> None:
    with pytest.raises(ScheduleError, match=r"unknown method 'ab3'; expected one of ab2, "):
        bake_schedules(trajectories, [4], BakeOptions(method="ab3"))


def test_a_grid_shorter_than_the_longest_span_can_be_calibrated(
    trajectories: Trajectories,
) -> None:
    options = BakeOptions("official", max_span=100)
    (schedule,) = bake_schedules(trajectories, [3], options)
    assert schedule.spans is not None
    assert max(schedule.spans) <= 12


def test_options_are_plain_data() -> None:
    assert (
        msgspec.json.decode(msgspec.json.encode(BakeOptions()), type=BakeOptions) == BakeOptions()
    )


def test_calibration_needs_torch_for_recording_only() -> None:
    modules = [f"meancache_trt.calibration.{name}" for name in ("baking", "metrics")]
    code = f"import sys, {', '.join(modules)}; print({{'torch', 'diffusers'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
