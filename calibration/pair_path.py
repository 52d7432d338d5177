"""The shortest path where an edge's cost depends on the edge before it.

Its states are pairs: the last node and the step that its edge leads to. The path minimises
Σ cost^γ, as in `path`; γ > 1 suppresses single bad edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import CalibrationError

ALWAYS_REACHED = 64
"""Edges are never limited to fewer steps: exact on usual grids, and T = 200 takes below 1 s."""


@dataclass(frozen=True)
class PairPath:
    """B nodes and Σ cost^γ over the B edges."""

    nodes: tuple[int, ...]
    cost: float


def edge_limit(steps: int, budget: int) -> int:
    """Steps that an edge may take, so that long grids stay quick and every path has room."""
    return min(steps, max(ALWAYS_REACHED, -(-2 * steps // min(budget, steps))))


def shortest_pair_path(costs: NDArray[np.float64], budget: int, gamma: float) -> PairPath:
    """Find the cheapest path of exactly `budget` nodes from step 0 to the end.

    Args:
        costs: (T, L + 1, L + 1), not negative; [t, p, q] is the edge from t to t + q after one
            from t − p to t, p = 0 is the first edge, and inf means that there is none.
        budget: B; more than T counts as T.
        gamma: exponent, above 0.

    Returns:
        One of the cheapest paths; where several are, always the same one.

    Raises:
        CalibrationError: where an argument is out of range, or every path has an infinite edge.
    """
    _check(costs, budget, gamma)
    powers = costs**gamma
    steps, count = len(costs), min(budget, len(costs))
    totals = np.full(costs.shape[:2], np.inf)
    totals[0] = powers[0, 0]
    parents = []
    for _ in range(1, count):
        totals, parent = _extended(totals, powers)
        parents.append(parent)
    node, cost = _cheapest_end(totals)
    if not np.isfinite(cost):
        raise CalibrationError(
            f"no path of {budget} nodes reaches the end, every one has an edge of infinite cost; "
            "raise the budget or allow longer edges"
        )
    nodes, ahead = [node], steps - node
    for parent in reversed(parents):
        ahead = int(parent[nodes[-1], ahead])
        nodes.append(nodes[-1] - ahead)
    return PairPath(tuple(reversed(nodes)), cost)


def _extended(
    totals: NDArray[np.float64], powers: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Paths with one edge more: `totals[t, q]` over (t, t + q), and the best p before it."""
    steps, width = totals.shape
    node, back = np.ogrid[:steps, 1:width]
    arriving = np.where(node >= back, totals[np.maximum(node - back, 0), back], np.inf)
    reached = arriving[:, :, None] + powers[:, 1:]
    parent = reached.argmin(axis=1)
    extended = np.take_along_axis(reached, parent[:, None], axis=1)[:, 0]
    return extended, parent + 1


def _cheapest_end(totals: NDArray[np.float64]) -> tuple[int, float]:
    """The last node, and the cost, of the best path whose last edge leads to T."""
    steps, width = totals.shape
    nodes = np.arange(max(steps - width + 1, 0), steps)
    ends = totals[nodes, steps - nodes]
    best = int(ends.argmin())
    return int(nodes[best]), float(ends[best])


def _check(costs: NDArray[np.float64], budget: int, gamma: float) -> None:
    if costs.ndim != 3 or costs.shape[1] != costs.shape[2] or costs.shape[1] < 2 or not costs.size:
        raise CalibrationError(
            f"expected edge costs of shape (T, L + 1, L + 1), found {costs.shape}; make them with "
            "two_term_edges"
        )
    if np.isnan(costs).any() or (costs < 0).any():
        raise CalibrationError("edge costs are not negative and not NaN; record again")
    if budget < 1:
        raise CalibrationError(f"a budget is at least 1 evaluation, found {budget}")
    if not (gamma > 0 and np.isfinite(gamma)):
        raise CalibrationError(f"gamma is a finite number above 0, found {gamma}; 1 sums the costs")
