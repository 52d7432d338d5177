"""Peak-Suppressed Shortest Path: which steps evaluate the network, and the span of each edge.

Steps 0 … T are vertices (T is the end of the grid), and from each step to each later one runs an
edge for every span K. The path minimises Σ cost^γ; γ > 1 suppresses single bad edges (MeanCache,
arXiv 2601.19961). As γ grows without end this becomes the path whose worst edge is best, which is
found directly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import CalibrationError


@dataclass(frozen=True)
class Path:
    """B nodes, the B − 1 spans of the edges between them, and Σ cost^γ over all B edges."""

    nodes: tuple[int, ...]
    spans: tuple[int, ...]
    cost: float


def shortest_path(
    costs: NDArray[np.float64], budget: int, gamma: float, *, is_exact: bool = True
) -> Path:
    """Find the cheapest path of `budget` nodes from step 0 to the end.

    Args:
        costs: (T, T + 1, K), not negative; [t, s, K − 1] is the edge from t to s with span K, and
            inf where there is none. The edge to T is taken with span 1 only, and spans longer than
            the history (K > t + 1) are not taken, whatever they cost.
        budget: B; more than T counts as T.
        gamma: exponent, above 0.
        is_exact: whether a path of fewer nodes is out of the question even where it is cheaper.

    Returns:
        One of the cheapest paths; where several are, always the same one, of the fewest nodes.

    Raises:
        CalibrationError: where an argument is out of range, or every path has an infinite edge.
    """
    _check(costs, budget, gamma)
    best, spans = _best_edges(costs**gamma)
    steps = len(best)
    totals, parents = _relax(best, min(budget, steps))
    counts = [len(totals) - 1] if is_exact else list(range(1, len(totals)))
    count = min(counts, key=lambda b: totals[b, steps])
    if not np.isfinite(totals[count, steps]):
        raise CalibrationError(
            f"no path of {budget} nodes reaches the end, every one has an edge of infinite cost; "
            "raise the budget or allow longer edges"
        )
    nodes = _walk_back(parents, count)
    taken = itertools.pairwise(nodes)
    return Path(nodes, tuple(int(spans[t, s]) for t, s in taken), float(totals[count, steps]))


def minimax_path(costs: NDArray[np.float64], budget: int) -> Path:
    """Find the path of exactly `budget` nodes whose costliest edge is the least.

    Among those it is the one of the least sum, which is its `cost`. Arguments and errors are those
    of `shortest_path`.
    """
    _check(costs, budget, gamma=1.0)
    edges, _ = _best_edges(costs)
    peak = _least_peak(edges, min(budget, len(edges)))
    return shortest_path(np.where(costs <= peak, costs, np.inf), budget, gamma=1.0)


def _least_peak(edges: NDArray[np.float64], budget: int) -> float:
    """The least cost below which a path of `budget` edges to the end exists."""
    peaks = np.full(len(edges) + 1, np.inf)
    peaks[0] = 0.0
    for _ in range(budget):
        peaks = np.maximum(peaks[:-1, None], edges).min(axis=0)
    return float(peaks[-1])


def _best_edges(
    costs: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The cheapest span of every edge, shortest first among equals: costs and spans (T, T + 1)."""
    steps, _, max_span = costs.shape
    node, target, span = np.ogrid[:steps, : steps + 1, 1 : max_span + 1]
    is_edge = (target > node) & (span <= node + 1) & ((target < steps) | (span == 1))
    allowed = np.where(is_edge, costs, np.inf)
    return allowed.min(axis=2), allowed.argmin(axis=2) + 1


def _relax(
    edges: NDArray[np.float64], budget: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """`totals[b, s]`: cheapest way to reach s from 0 over b edges, and the step before s on it."""
    steps = len(edges)
    totals = np.full((budget + 1, steps + 1), np.inf)
    parents = np.zeros((budget + 1, steps + 1), np.int64)
    totals[0, 0] = 0.0
    for count in range(1, budget + 1):
        reached = totals[count - 1, :steps, None] + edges
        parents[count] = reached.argmin(axis=0)
        totals[count] = reached.min(axis=0)
    return totals, parents


def _walk_back(parents: NDArray[np.int64], count: int) -> tuple[int, ...]:
    nodes, step = [], parents.shape[1] - 1
    for edges in range(count, 0, -1):
        step = int(parents[edges, step])
        nodes.append(step)
    return tuple(reversed(nodes))


def _check(costs: NDArray[np.float64], budget: int, gamma: float) -> None:
    if costs.ndim != 3 or costs.shape[1] != costs.shape[0] + 1 or not costs.size:
        raise CalibrationError(
            f"expected edge costs of shape (T, T + 1, K), found {costs.shape}; measure them with "
            "measure_costs"
        )
    if np.isnan(costs).any() or (costs < 0).any():
        raise CalibrationError("edge costs are not negative and not NaN; record again")
    if budget < 1:
        raise CalibrationError(f"a budget is at least 1 evaluation, found {budget}")
    if not (gamma > 0 and np.isfinite(gamma)):
        raise CalibrationError(f"gamma is a finite number above 0, found {gamma}; 1 sums the costs")
