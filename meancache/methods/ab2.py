"""Adams-Bashforth of second order with variable steps, on the nodes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.folding import Rows, interval_widths
from meancache_trt.meancache.methods.base import Method


def _fold(sigmas: NDArray[np.float64], nodes: Sequence[int], _spans: Sequence[int]) -> Rows:
    widths = interval_widths(sigmas, nodes)
    rows: list[tuple[float, ...]] = [(float(widths[0]),)]
    for earlier, width in itertools.pairwise(widths):
        extrapolated = width * (width / earlier) / 2
        rows.append((float(width + extrapolated), float(-extrapolated)))
    return tuple(rows)


METHOD = Method("ab2", "Adams-Bashforth of order 2 on the nodes", _fold, placement="own-grid")
