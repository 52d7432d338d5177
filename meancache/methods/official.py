"""The recursion of the MeanCache authors' inference scripts, one estimate a skipped step.

At a skipped step i with window start i0 = i − K, h_i = σ_{i+1} − σ_i and W = σ_i − σ_{i0}:

    v̂_i = v_{i−1} + h_i · (x_i − x_{i0} − W·v_{i0}) / W²

v_{i−1} and v_{i0} may themselves be estimates. This is not the paper's single jump, which is
`paper`. With K = 1 the bracket is zero and v_{i−1} is reused; the scripts compute it all the same
and feed rounding residue of their bfloat16 latents back into v, which is not imitated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.folding import Coefficients, Rows, Trace, fold_steps
from meancache_trt.meancache.methods.base import Method


def _fold(sigmas: NDArray[np.float64], nodes: Sequence[int], spans: Sequence[int]) -> Rows:
    def estimate(trace: Trace, step: int, node: int) -> Coefficients:
        last = trace.velocities[-1]
        start = step - min(spans[node], step)
        if step - start == 1:
            return last
        window = sigmas[step] - sigmas[start]
        drift = trace.latents[step] - trace.latents[start] - window * trace.velocities[start]
        return np.asarray(last + (sigmas[step + 1] - sigmas[step]) * drift / window**2)

    return fold_steps(sigmas, nodes, estimate)


METHOD = Method(
    "official",
    "the authors' recursion over skipped steps",
    _fold,
    uses_spans=True,
    placement="path",
)
