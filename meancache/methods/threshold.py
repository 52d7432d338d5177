"""Reuse until the accumulated change of the velocity passes a threshold (as TeaCache decides).

TeaCache (arXiv 2411.19108) decides while it renders; here the same decision is taken once, from
recorded trajectories, and baked. The weights are plain reuse; what differs is the choice of nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.methods.base import Method
from meancache_trt.meancache.methods.euler import fold_reuse


def nodes_above(change: NDArray[np.float64], threshold: float) -> tuple[int, ...]:
    """Nodes where the change accumulated since the last node reaches `threshold`.

    `change[i]`, shape (T − 1,), is the relative change of the velocity from step i to i + 1.
    """
    nodes, accumulated = [0], 0.0
    for step, amount in enumerate(change, start=1):
        accumulated += amount
        if accumulated >= threshold:
            nodes.append(step)
            accumulated = 0.0
    return tuple(nodes)


def select_nodes(change: NDArray[np.float64], budget: int) -> tuple[int, ...]:
    """Exactly `budget` nodes, by the lowest threshold that does not exceed it.

    Where equal changes make the count jump over the budget, the widest gaps are halved.
    """
    steps = len(change) + 1
    if not 1 <= budget <= steps:
        raise ScheduleError(f"a budget is 1 to {steps} evaluations on this grid, found {budget}")
    low, high = 0.0, float(change.sum()) + 1.0
    for _ in range(64):
        middle = (low + high) / 2
        if len(nodes_above(change, middle)) > budget:
            low = middle
        else:
            high = middle
    return fill_gaps(nodes_above(change, high), budget, steps)


def fill_gaps(nodes: tuple[int, ...], budget: int, steps: int) -> tuple[int, ...]:
    """Add nodes in the middle of the widest gaps until there are `budget`."""
    filled = list(nodes)
    while len(filled) < budget:
        ends = [*filled[1:], steps]
        widest = max(range(len(filled)), key=lambda k: ends[k] - filled[k])
        filled.insert(widest + 1, (filled[widest] + ends[widest]) // 2)
    return tuple(filled)


METHOD = Method(
    "threshold", "plain reuse, nodes by accumulated change", fold_reuse, placement="change"
)
