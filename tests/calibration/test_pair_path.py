from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from meancache_trt.calibration.pair_path import edge_limit, shortest_pair_path
from meancache_trt.errors import CalibrationError

Costs = NDArray[np.float64]


@st.composite
def graphs(draw: st.DrawFn) -> Costs:
    """Up to 12 steps and any edge limit; few distinct costs make ties, and inf is common."""
    steps = draw(st.integers(1, 12))
    reach = draw(st.integers(1, steps))
    elements = st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0, np.inf])
    return draw(arrays(np.float64, (steps, reach + 1, reach + 1), elements=elements))


def along(costs: Costs, nodes: tuple[int, ...], gamma: float) -> float:
    """Σ cost^γ of a path, infinite where one of its edges is too long."""
    total, before = 0.0, nodes[0]
    for node, target in itertools.pairwise((*nodes, len(costs))):
        back, ahead = node - before, target - node
        is_edge = max(back, ahead) < costs.shape[1]
        total += float(costs[node, back, ahead]) ** gamma if is_edge else np.inf
        before = node
    return total


def paths(costs: Costs, count: int) -> Iterator[tuple[int, ...]]:
    for rest in itertools.combinations(range(1, len(costs)), count - 1):
        yield (0, *rest)


@settings(max_examples=150, deadline=None)
@given(costs=graphs(), budget=st.integers(1, 14), gamma=st.sampled_from([0.5, 1.0, 2.0, 8.0]))
def test_path_is_the_best_of_all(costs: Costs, budget: int, gamma: float) -> None:
    count = min(budget, len(costs))
    best = min(along(costs, nodes, gamma) for nodes in paths(costs, count))
    if not np.isfinite(best):
        with pytest.raises(CalibrationError, match="every one has an edge of infinite cost"):
            shortest_pair_path(costs, budget, gamma)
        return
    path = shortest_pair_path(costs, budget, gamma)
    assert path.cost == pytest.approx(best, rel=1e-12)  # the same sums in another order
    assert len(path.nodes) == count
    assert along(costs, path.nodes, gamma) == pytest.approx(path.cost, rel=1e-12)


def test_the_choice_between_equal_paths_is_stable() -> None:
    costs = np.ones((6, 7, 7))
    assert shortest_pair_path(costs, 3, 2.0) == shortest_pair_path(costs.copy(), 3, 2.0)


def test_an_edge_costs_what_the_edge_before_makes_of_it() -> None:
    costs = np.ones((4, 5, 5))
    costs[2, 1, 2] = 0.0  # at 2, but only when coming from 1
    costs[0, 0, 1] = 1.5
    assert shortest_pair_path(costs, 3, 1.0).nodes == (0, 1, 2)


def test_one_node_goes_to_the_end() -> None:
    costs = np.full((5, 6, 6), 3.0)
    path = shortest_pair_path(costs, 1, 2.0)
    assert (path.nodes, path.cost) == ((0,), 9.0)


def test_a_budget_above_the_grid_evaluates_every_step() -> None:
    assert shortest_pair_path(np.ones((4, 5, 5)), 9, 1.0).nodes == (0, 1, 2, 3)


@pytest.mark.parametrize(("steps", "budget", "limit"), [(50, 5, 50), (200, 5, 80), (200, 25, 64)])
def test_edges_are_limited_on_long_grids_only(steps: int, budget: int, limit: int) -> None:
    assert edge_limit(steps, budget) == limit


def test_one_edge_over_a_long_grid_is_within_the_limit() -> None:
    assert edge_limit(500, 1) == 500


GRAPH = np.ones((4, 5, 5))


@pytest.mark.parametrize(
    ("costs", "budget", "gamma", "message"),
    [
        (GRAPH, 0, 1.0, "at least 1 evaluation, found 0"),
        (GRAPH, 2, 0.0, "above 0, found 0.0"),
        (GRAPH, 2, np.inf, "above 0, found inf"),
        (GRAPH * np.nan, 2, 1.0, "not NaN"),
        (-GRAPH, 2, 1.0, "not negative"),
        (GRAPH[:, :4], 2, 1.0, r"found \(4, 4, 5\)"),
        (GRAPH[:, :1, :1], 2, 1.0, r"found \(4, 1, 1\)"),
        (GRAPH[:, :2, :2], 1, 1.0, "raise the budget or allow longer edges"),
    ],
)
def test_arguments_out_of_range_are_errors(
    costs: Any, budget: int, gamma: float, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        shortest_pair_path(costs, budget, gamma)
