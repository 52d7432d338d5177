"""What a method is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.folding import Rows, check_nodes, check_spans

Fold = Callable[[NDArray[np.float64], Sequence[int], Sequence[int]], Rows]


@dataclass(frozen=True)
class Method:
    """An analytic rule: weights follow from sigmas, nodes and spans, without any data.

    `fold_rule` receives T + 1 sigmas (float64), B nodes and, where `uses_spans`, B spans, the
    last of which is 1: after the last node its velocity is reused. `placement` names how nodes are
    usually placed for a budget, one of `calibration.placements`: evenly, unless the rule says more.
    """

    name: str
    summary: str
    fold_rule: Fold
    uses_spans: bool = False
    placement: str = "even"

    def fold(
        self, sigmas: NDArray[np.float64], nodes: Sequence[int], spans: Sequence[int] | None = None
    ) -> Rows:
        """Return B rows of weights; row n is for v_n, v_{n−1}, …, and sums to σ_next − σ_n.

        Args:
            sigmas: T + 1 descending values, float64.
            nodes: B ascending steps, from 0.
            spans: B − 1 numbers of grid steps, where the method uses them.

        Raises:
            ScheduleError: where nodes or spans are malformed, or spans are given without use.
        """
        check_nodes(nodes, len(sigmas) - 1)
        if self.uses_spans:
            return self.fold_rule(sigmas, nodes, check_spans(spans, nodes))
        if spans is not None:
            raise ScheduleError(f"method {self.name!r} takes no spans; leave them out")
        return self.fold_rule(sigmas, nodes, ())
