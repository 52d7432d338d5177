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

from meancache_trt.calibration.path import minimax_path, shortest_path
from meancache_trt.errors import CalibrationError

Costs = NDArray[np.float64]


@st.composite
def graphs(draw: st.DrawFn) -> Costs:
    """Up to 12 steps; few distinct costs make ties, and infinite edges are common."""
    steps, spans = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    elements = st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0, np.inf])
    return draw(arrays(np.float64, (steps, steps + 1, spans), elements=elements))


def paths(costs: Costs, budget: int, gamma: float) -> Iterator[tuple[int, float]]:
    """(number of nodes, cost) of every choice of nodes, each edge with its best allowed span."""
    for count in range(1, min(budget, len(costs)) + 1):
        for edges in edges_of_paths(costs, count):
            yield count, sum(edge**gamma for edge in edges)


def edges_of_paths(costs: Costs, count: int) -> Iterator[list[float]]:
    """The cost of each edge, with its best allowed span, of every choice of `count` nodes."""
    steps, _, max_span = costs.shape
    best = {
        (t, s): best_span(costs, t, s, max_span)
        for t, s in itertools.combinations(range(steps + 1), 2)
    }
    for rest in itertools.combinations(range(1, steps), count - 1):
        yield [best[edge] for edge in itertools.pairwise((0, *rest, steps))]


def best_span(costs: Costs, node: int, target: int, max_span: int) -> float:
    longest = 1 if target == len(costs) else min(max_span, node + 1)
    return min(float(costs[node, target, span - 1]) for span in range(1, longest + 1))


@settings(max_examples=150, deadline=None)
@given(
    costs=graphs(),
    budget=st.integers(1, 14),
    gamma=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    is_exact=st.booleans(),
)
def test_path_is_the_best_of_all(costs: Costs, budget: int, gamma: float, is_exact: bool) -> None:
    steps = len(costs)
    wanted = min(budget, steps)
    found = list(paths(costs, budget, gamma))
    best = min(cost for count, cost in found if count == wanted or not is_exact)
    if not np.isfinite(best):
        with pytest.raises(CalibrationError, match="every one has an edge of infinite cost"):
            shortest_path(costs, budget, gamma, is_exact=is_exact)
        return
    path = shortest_path(costs, budget, gamma, is_exact=is_exact)
    assert path.cost == pytest.approx(best, rel=1e-12)  # the same sums in another order
    assert path.nodes[0] == 0
    assert len(path.nodes) == wanted if is_exact else len(path.nodes) <= wanted
    assert len(path.spans) == len(path.nodes) - 1
    assert all(1 <= k <= t + 1 for t, k in zip(path.nodes, path.spans, strict=False))
    edges = zip(path.nodes, [*path.nodes[1:], steps], [*path.spans, 1], strict=True)
    cost = sum(float(costs[t, s, k - 1]) ** gamma for t, s, k in edges)
    assert cost == pytest.approx(path.cost, rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(costs=graphs(), budget=st.integers(1, 14))
def test_minimax_path_has_the_least_peak_and_then_the_least_sum(costs: Costs, budget: int) -> None:
    steps = len(costs)
    wanted = min(budget, steps)
    peak, total = min((max(edges), sum(edges)) for edges in edges_of_paths(costs, wanted))
    if not np.isfinite(peak):
        with pytest.raises(CalibrationError, match="every one has an edge of infinite cost"):
            minimax_path(costs, budget)
        return
    path = minimax_path(costs, budget)
    assert len(path.nodes) == wanted
    edges = zip(path.nodes, [*path.nodes[1:], steps], [*path.spans, 1], strict=True)
    taken = [float(costs[t, s, k - 1]) for t, s, k in edges]
    # sums of the halves and whole numbers above are exact in any order
    assert (max(taken), sum(taken), path.cost) == (peak, total, total)


def test_a_lower_peak_on_the_way_does_not_count_below_the_worst_edge() -> None:
    """Up to step 3 the way over 1 has the lower peak, the way over 2 the lower sum."""
    costs = np.full((4, 5, 1), np.inf)
    costs[0, 1, 0], costs[1, 3, 0] = 3.0, 3.0
    costs[0, 2, 0], costs[2, 3, 0] = 4.0, 1.0
    costs[3, 4, 0] = 4.0  # every path's peak is 4 here
    assert minimax_path(costs, 3).nodes == (0, 2, 3)
    costs[3, 4, 0] = 3.5
    assert minimax_path(costs, 3).nodes == (0, 1, 3)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_minimax_is_the_limit_of_a_large_gamma(scale: float) -> None:
    costs = np.random.default_rng(5).uniform(1, 2, (9, 10, 2))
    limit = shortest_path(costs, 4, 400.0)  # 2^400 is a float64, and sets apart ratios of 1.01
    assert minimax_path(costs * scale, 4).nodes == limit.nodes


def test_among_equal_paths_the_choice_is_stable_and_spans_are_short() -> None:
    path = shortest_path(np.ones((6, 7, 3)), 3, 2.0)
    assert path == shortest_path(np.ones((6, 7, 3)), 3, 2.0)
    assert path.spans == (1, 1)
    assert len(shortest_path(np.zeros((6, 7, 3)), 4, 2.0, is_exact=False).nodes) == 1


def test_a_large_gamma_avoids_the_single_worst_edge() -> None:
    costs = np.full((3, 4, 1), 9.0)
    costs[0, 1, 0], costs[1, 3, 0] = 0.0, 3.0  # sum 3, peak 3
    costs[0, 2, 0], costs[2, 3, 0] = 2.0, 2.0  # sum 4, peak 2
    assert shortest_path(costs, 2, 1.0).nodes == (0, 1)
    assert shortest_path(costs, 2, 2.0).nodes == (0, 2)


def test_one_node_reuses_its_velocity_to_the_end() -> None:
    path = shortest_path(np.ones((5, 6, 2)), 1, 3.0)
    assert (path.nodes, path.spans, path.cost) == ((0,), (), 1.0)


def test_a_budget_above_the_grid_evaluates_every_step() -> None:
    path = shortest_path(np.ones((4, 5, 2)), 9, 1.0)
    assert path.nodes == (0, 1, 2, 3)


GRAPH = np.ones((4, 5, 2))


@pytest.mark.parametrize(
    ("costs", "budget", "gamma", "message"),
    [
        (GRAPH, 0, 1.0, "at least 1 evaluation, found 0"),
        (GRAPH, 2, 0.0, "above 0, found 0.0"),
        (GRAPH, 2, np.inf, "above 0, found inf"),
        (GRAPH * np.nan, 2, 1.0, "not NaN"),
        (-GRAPH, 2, 1.0, "not negative"),
        (GRAPH[:, :4], 2, 1.0, r"found \(4, 4, 2\)"),
        (GRAPH[:0, :1], 2, 1.0, r"found \(0, 1, 2\)"),
    ],
)
def test_arguments_out_of_range_are_errors(
    costs: Any, budget: int, gamma: float, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        shortest_path(costs, budget, gamma)
