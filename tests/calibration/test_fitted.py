"""Fitted schedules from end to end, on a field that is known in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.calibration.conftest import FormulaField

from meancache_trt.calibration.baking import BakeOptions, bake_for_goal, bake_schedules
from meancache_trt.calibration.fidelity import Judge, judging, mean_error
from meancache_trt.calibration.fitted import check_field, fitted_choices
from meancache_trt.calibration.refit import mean_gram
from meancache_trt.calibration.sequential_fit import fit_rows
from meancache_trt.calibration.target import Goal
from meancache_trt.calibration.trajectories import Array, Prompt, Trajectories
from meancache_trt.calibration.two_term import two_term_edges
from meancache_trt.errors import CalibrationError, ScheduleError
from meancache_trt.meancache.schedule import Schedule, bake, load_schedule, save_schedule
from meancache_trt.meancache.sigmas import make_grid

FITTED = BakeOptions(method="fitted")


def psnr_of(schedule: Schedule) -> float:
    assert schedule.calibration is not None
    assert schedule.calibration.fidelity is not None
    return schedule.calibration.fidelity.psnr.mean


def test_pictures_come_closer_as_evaluations_are_added(
    samples: Trajectories, network: FormulaField
) -> None:
    found = [psnr_of(s) for s in bake_schedules(samples, (1, 2, 4, 6, 8), FITTED, network)]
    assert found == sorted(found)
    assert found[-1] > found[0] + 20


def test_all_steps_are_eulers_bit_for_bit(samples: Trajectories, network: FormulaField) -> None:
    (schedule,) = bake_schedules(samples, [12], FITTED, network)
    assert schedule.weights == bake("euler", samples.grid, range(12)).weights
    assert network.evaluations == 12  # whether it is the network that was recorded
    assert schedule.calibration is not None
    assert schedule.calibration.noise_floor == pytest.approx(100, abs=5)


def test_a_schedule_carries_its_settings_and_evidence(
    samples: Trajectories, network: FormulaField, tmp_path: Path
) -> None:
    (schedule,) = bake_schedules(samples, [4], FITTED, network)
    assert (schedule.name, schedule.method, schedule.spans) == ("fitted-b4", "fitted", None)
    assert (schedule.guidance_scale, schedule.family) == (3.5, "flux")
    evidence = schedule.calibration
    assert evidence is not None
    assert evidence.samples == 6
    assert evidence.network_evaluations == 6 * 12 + network.evaluations
    assert evidence.candidates == len(FITTED.gammas) + 1
    assert evidence.fidelity is not None
    assert evidence.euler is not None
    assert evidence.fidelity.psnr.mean > evidence.euler.psnr.mean
    assert evidence.stability is not None
    assert evidence.gamma in FITTED.gammas
    assert evidence.edge_costs is not None
    assert len(evidence.edge_costs) == 4
    costs = np.array(evidence.edge_costs)
    assert evidence.path_cost == pytest.approx((costs**evidence.gamma).sum())
    save_schedule(schedule, tmp_path / "b4.json")
    assert load_schedule(tmp_path / "b4.json") == schedule
    with pytest.raises(ScheduleError, match="calibrated on another grid"):
        schedule.fit_to(make_grid(12, shift=5.0), 3.5)


@pytest.fixture
def judge(samples: Trajectories, network: FormulaField) -> Iterator[Judge]:
    with judging(samples, network) as judge:
        yield judge


def test_edge_costs_are_those_of_the_nodes_taken(samples: Trajectories, judge: Judge) -> None:
    choice = fitted_choices(judge, [2.0])(3)
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


def test_the_candidate_with_the_best_held_out_pictures_is_taken(judge: Judge) -> None:
    gammas = (0.3, 2.0, 12.0)
    chosen = fitted_choices(judge, gammas)(4)
    alone = [fitted_choices(judge, [gamma])(4) for gamma in gammas]
    assert len({choice.nodes for choice in alone}) > 1
    scores = [choice.outcome.score for choice in alone if choice.outcome]
    assert chosen.outcome is not None
    assert chosen.outcome.score == max(scores)
    assert chosen.rows == fit_rows(judge.trajectories, judge.field, chosen.nodes).rows


def test_equal_paths_are_fitted_once(judge: Judge, network: FormulaField) -> None:
    choice = fitted_choices(judge, [2.0, 2.0, 2.0])(5)
    assert choice.evaluations == network.evaluations == 6 * 4
    assert choice.candidates == 3


def test_the_network_runs_no_more_than_the_candidates_need(
    samples: Trajectories, network: FormulaField
) -> None:
    for budget in (2, 4, 8):
        (schedule,) = bake_schedules(samples, [budget], FITTED, network)
        evidence = schedule.calibration
        assert evidence is not None
        assert evidence.network_evaluations is not None
        assert evidence.candidates is not None
        assert evidence.network_evaluations <= 6 * 12 + 6 * budget * evidence.candidates


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


def test_too_few_samples_are_refused(samples: Trajectories, network: FormulaField) -> None:
    alone = Trajectories(samples.directory, samples.settings, samples.samples[:1])
    with pytest.raises(CalibrationError, match="needs at least 2, found 1"):
        bake_schedules(alone, [4], FITTED, network)


def test_other_methods_run_the_network_only_to_be_measured(
    samples: Trajectories, network: FormulaField
) -> None:
    options = BakeOptions("official")
    (unmeasured,) = bake_schedules(samples, [4], options)
    (measured,) = bake_schedules(samples, [4], options, network)
    assert measured.weights == unmeasured.weights
    assert unmeasured.calibration is not None
    assert unmeasured.calibration.fidelity is None
    assert measured.calibration is not None
    assert measured.calibration.fidelity is not None
    # the network checked and its floor, the schedule, and Euler on its nodes
    assert network.evaluations == 12 + 2 * 6 * 3


def test_a_schedule_that_is_worse_than_euler_says_so(
    samples: Trajectories, network: FormulaField
) -> None:
    (fitted,) = bake_schedules(samples, [3], FITTED, network)
    (ab2,) = bake_schedules(samples, [3], BakeOptions("ab2", placement="even"), network)
    assert fitted.calibration is not None
    assert ab2.calibration is not None
    assert not fitted.calibration.is_worse_than_euler
    assert ab2.calibration.is_worse_than_euler


def test_a_goal_is_reached_by_the_smallest_budget(
    samples: Trajectories, network: FormulaField
) -> None:
    found, tried = bake_for_goal(samples, Goal(45.0, 5.0), FITTED, network)
    assert found in tried
    confidences = {s.budget: s.calibration.target.confidence for s in tried}  # type: ignore[union-attr]
    assert confidences[found.budget] >= 0.95
    assert all(sure < 0.95 for budget, sure in confidences.items() if budget < found.budget)
    assert 1 < found.budget < 12
    every_step, _ = bake_for_goal(samples, Goal(99.9), FITTED, network)
    assert every_step.budget == 12


def test_a_goal_needs_pictures(samples: Trajectories) -> None:
    with pytest.raises(CalibrationError, match=r"only be judged in pictures.*give the bundle"):
        bake_for_goal(samples, Goal(45.0), BakeOptions("official"))


def test_errors_are_averaged_as_decibels_are() -> None:
    assert mean_error(np.array([1e-1, 1e-3])) == pytest.approx(1e-2)
    assert mean_error(np.array([0.0, 0.0])) > 0  # no logarithm of zero


def test_a_goal_cannot_be_judged_on_a_grid_of_its_own(
    samples: Trajectories, network: FormulaField
) -> None:
    with pytest.raises(CalibrationError, match="judged on the recorded grid, found 'unipc'"):
        bake_for_goal(samples, Goal(45.0), BakeOptions("unipc"), network)


def test_a_goal_that_a_method_does_not_reach_is_an_error(
    samples: Trajectories, network: FormulaField
) -> None:
    options = BakeOptions("ab2", placement="even")
    with pytest.raises(CalibrationError, match=r"no budget up to 12 is sure to reach 99 dB"):
        bake_for_goal(samples, Goal(99.0), options, network)


def test_euler_is_measured_once(samples: Trajectories, network: FormulaField) -> None:
    (schedule,) = bake_schedules(samples, [4], BakeOptions("euler"), network)
    assert schedule.calibration is not None
    assert schedule.calibration.candidates == 1
    assert schedule.calibration.network_evaluations == 6 * 12 + network.evaluations
    assert schedule.calibration.euler == schedule.calibration.fidelity
