"""Euler's method on the nodes: the last velocity serves until the next node."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.folding import Rows, interval_widths
from meancache_trt.meancache.methods.base import Method


def fold_reuse(sigmas: NDArray[np.float64], nodes: Sequence[int], _spans: Sequence[int]) -> Rows:
    """Row n is (σ_next − σ_n,): exact, so that B = T gives diffusers' own Euler bit for bit."""
    return tuple((float(width),) for width in interval_widths(sigmas, nodes))


METHOD = Method("euler", "plain reuse of the last velocity", fold_reuse, placement="path")
