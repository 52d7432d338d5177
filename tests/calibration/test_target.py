"""Choosing a budget by quality."""

from __future__ import annotations

import numpy as np
import pytest

from meancache_trt.calibration.target import Goal, reached, smallest_budget
from meancache_trt.errors import CalibrationError


@pytest.mark.parametrize("percentile", [None, 5.0, 25.0])
def test_confidence_is_the_share_of_truths_that_reach_the_goal(percentile: float | None) -> None:
    """Over many worlds, a goal at the 80 % bound is missed in one of five."""
    rng, below = np.random.default_rng(1), {None: 0.0, 5.0: 1.6449, 25.0: 0.6745}[percentile]
    goal, worlds = Goal(40 - 3 * below, percentile), 300
    # The goal is the truth: a bound of 80 % confidence lies below it in four worlds of five.
    found = [reached(40 + 3 * rng.standard_normal(16), goal) for _ in range(worlds)]
    assert np.mean(np.array(found) <= 0.8) == pytest.approx(0.8, abs=0.07)  # 3 standard errors


def test_confidence_falls_as_the_goal_rises_and_with_the_spread() -> None:
    narrow, wide = np.linspace(39, 41, 16), np.linspace(30, 50, 16)
    goals = [Goal(level, 5.0) for level in (30.0, 36.0, 39.0, 45.0)]
    confidences = [reached(narrow, goal) for goal in goals]
    assert confidences == sorted(confidences, reverse=True)
    assert reached(wide, goals[1]) < reached(narrow, goals[1])
    assert reached(narrow, goals[0]) > 0.999
    assert reached(narrow, goals[-1]) < 0.001


def rising(budget: int) -> tuple[str, np.ndarray | None]:
    """5 dB an evaluation, the same spread everywhere; 10 of 10 steps differ in nothing."""
    return f"b{budget}", None if budget == 10 else 5 * budget + np.linspace(-1, 1, 16)


@pytest.mark.parametrize(
    ("level", "budget"), [(1.0, 1), (24.0, 5), (26.0, 6), (49.9, 10), (99, 10)]
)
def test_the_smallest_budget_that_reaches_the_goal_is_found(level: float, budget: int) -> None:
    found, tried = smallest_budget(rising, 10, Goal(level))
    assert (found.budget, found.result) == (budget, f"b{budget}")
    assert found.confidence >= 0.95
    assert [entry.budget for entry in tried] == sorted({entry.budget for entry in tried})
    assert len(tried) <= 5  # bisection of ten, and the end itself
    assert all(entry.confidence < 0.95 for entry in tried if entry.budget < budget)


def test_a_single_sample_says_nothing_of_the_spread() -> None:
    with pytest.raises(CalibrationError, match="found 1; record more"):
        reached(np.array([40.0]), Goal(35))


@pytest.mark.parametrize(
    "goal", [(0.0, None, 0.9), (35.0, 0.0, 0.9), (35.0, 5.0, 1.0), (120.0, 5.0, 0.9)]
)
def test_goals_out_of_range_are_errors(goal: tuple[float, float | None, float]) -> None:
    with pytest.raises(CalibrationError, match="a target is a PSNR above 0"):
        Goal(*goal)
