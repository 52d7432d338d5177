"""Taylor extrapolation of the velocity over skipped steps (TaylorSeer, arXiv 2503.06923).

Derivatives are finite differences between evaluated nodes, in step index, and the k-th term is
D^k · (i − node)^k / k!. TaylorSeer forecasts features inside each block; on the velocity the same
forecast is linear and folds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.folding import Coefficients, Rows, Trace, fold_steps
from meancache_trt.meancache.methods.base import Fold, Method


def _differences(nodes: Sequence[int], order: int) -> list[list[Coefficients]]:
    """Divided differences at every node up to `order`, as far as the history allows."""
    identity = np.eye(len(nodes))
    table: list[list[Coefficients]] = []
    for node, step in enumerate(nodes):
        row: list[Coefficients] = [identity[node]]
        if node:
            gap = step - nodes[node - 1]
            for lower in table[-1][:order]:
                row.append((row[-1] - lower) / gap)
        table.append(row)
    return table


def _fold_of_order(order: int) -> Fold:
    def fold(sigmas: NDArray[np.float64], nodes: Sequence[int], _spans: Sequence[int]) -> Rows:
        table = _differences(nodes, order)

        def estimate(_trace: Trace, step: int, node: int) -> Coefficients:
            ahead = step - nodes[node]
            terms = [d * ahead**k / math.factorial(k) for k, d in enumerate(table[node])]
            return np.asarray(sum(terms))

        return fold_steps(sigmas, nodes, estimate)

    return fold


METHODS = tuple(
    Method(
        f"taylor{order}", f"Taylor forecast of order {order} of the velocity", _fold_of_order(order)
    )
    for order in (1, 2)
)
