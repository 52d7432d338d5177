"""Fitted schedules from end to end, on a field that is known in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.calibration.conftest import FormulaField

from meancache_trt.calibration.baking import BakeOptions, bake_schedules
from meancache_trt.calibration.fitted import check_field, fitted_choices, mean_error
from meancache_trt.calibration.refit import mean_gram
from meancache_trt.calibration.sequential_fit import FitOptions, fit_rows
from meancache_trt.calibration.trajectories import Array, Prompt, Trajectories
from meancache_trt.calibration.two_term import two_term_edges
from meancache_trt.errors import CalibrationError, ScheduleError
from meancache_trt.meancache.schedule import bake, load_schedule, save_schedule
from meancache_trt.meancache.sigmas import make_grid

FITTED = BakeOptions(method="fitted")


def test_error_falls_as_evaluations_are_added(samples: Trajectories, network: FormulaField) -> None:
    schedules = bake_schedules(samples, (1, 2, 4, 6, 8), FITTED, network)
    errors = [s.calibration.held_out_error for s in schedules if s.calibration]
    assert errors == sorted(errors, reverse=True)  # type: ignore[type-var]
    assert errors[-1] < errors[0] / 100  # type: ignore[operator]


def test_all_steps_are_eulers_bit_for_bit(samples: Trajectories, network: FormulaField) -> None:
    (schedule,) = bake_schedules(samples, [12], FITTED, network)
    assert schedule.weights == bake("euler", samples.grid, range(12)).weights
    assert network.evaluations == 1  # whether it is the network that was recorded


def test_a_schedule_carries_its_settings_and_evidence(
    samples: Trajectories, network: FormulaField, tmp_path: Path
) -> None:
    (schedule,) = bake_schedules(samples, [4], FITTED, network)
    assert (schedule.name, schedule.method, schedule.spans) == ("fitted-b4", "fitted", None)
    assert (schedule.guidance_scale, schedule.family) == (3.5, "flux")
    evidence = schedule.calibration
    assert evidence is not None
    assert evidence.samples == 6
    assert evidence.network_evaluations == 6 * 12 + network.evaluations - 1
    assert evidence.gamma in FITTED.gammas
    assert evidence.edge_costs is not None
    assert len(evidence.edge_costs) == 4
    costs = np.array(evidence.edge_costs)
    assert evidence.path_cost == pytest.approx((costs**evidence.gamma).sum())
    save_schedule(schedule, tmp_path / "b4.json")
    assert load_schedule(tmp_path / "b4.json") == schedule
    with pytest.raises(ScheduleError, match="calibrated on another grid"):
        schedule.fit_to(make_grid(12, shift=5.0), 3.5)


def test_edge_costs_are_those_of_the_nodes_taken(
    samples: Trajectories, network: FormulaField
) -> None:
    choice = fitted_choices(samples, network, [2.0])(3)
    costs = two_term_edges(
        mean_gram(samples), samples.grid.array(), is_consistent=True
    ).costs  # γ = 2 is the root mean square
    first, second, third = choice.nodes
    assert choice.edge_costs is not None
    wanted = [
        costs[0, 0, second],
        costs[second, second - first, third - second],
        costs[third, third - second, 12 - third],
    ]
    np.testing.assert_allclose(choice.edge_costs, wanted, rtol=1e-4)


def test_the_candidate_that_ends_nearest_on_held_out_samples_is_taken(
    samples: Trajectories, network: FormulaField
) -> None:
    gammas = (0.3, 2.0, 12.0)
    chosen = fitted_choices(samples, network, gammas)(4)
    alone = [fitted_choices(samples, network, [gamma])(4) for gamma in gammas]
    assert len({choice.nodes for choice in alone}) > 1
    errors = [choice.held_out_error for choice in alone]
    assert chosen.held_out_error == min(errors)  # type: ignore[type-var]
    held_out = fit_rows(samples, network, chosen.nodes, FitOptions())
    assert chosen.held_out_error == mean_error(held_out.errors)
    assert chosen.rows == fit_rows(samples, network, chosen.nodes, FitOptions(folds=1)).rows


def test_equal_paths_are_fitted_once(samples: Trajectories, network: FormulaField) -> None:
    choice = fitted_choices(samples, network, [2.0, 2.0, 2.0])(5)
    assert choice.evaluations == network.evaluations - 1 == 2 * 6 * 4


def test_the_field_that_was_recorded_is_known_again(
    samples: Trajectories, network: FormulaField
) -> None:
    check_field(samples, network)
    assert network.evaluations == 1


def test_a_network_under_another_guidance_is_refused(samples: Trajectories) -> None:
    class Guided(FormulaField):
        def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:
            return super().__call__(prompts, latents, step) * np.float32(1.1)

    with pytest.raises(CalibrationError, match=r"is 10\.0% away from the recorded one.*guidance"):
        bake_schedules(samples, [4], FITTED, Guided(samples.grid))


def test_without_a_network_nothing_is_fitted(samples: Trajectories) -> None:
    with pytest.raises(CalibrationError, match="found none; give the bundle"):
        bake_schedules(samples, [4], FITTED)


def test_too_few_samples_are_refused(trajectories: Trajectories, network: FormulaField) -> None:
    with pytest.raises(CalibrationError, match="4 folds, found 3 samples"):
        bake_schedules(trajectories, [4], FITTED, network)


def test_other_methods_do_not_run_the_network(samples: Trajectories, network: FormulaField) -> None:
    bake_schedules(samples, [4], BakeOptions(), network)
    assert network.evaluations == 0


def test_errors_are_averaged_as_decibels_are() -> None:
    assert mean_error(np.array([1e-1, 1e-3])) == pytest.approx(1e-2)
    assert mean_error(np.array([0.0, 0.0])) > 0  # no logarithm of zero
