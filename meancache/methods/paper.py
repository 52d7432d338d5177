"""The jump of the MeanCache paper (arXiv 2601.19961): one average velocity an interval.

From node t with span K, r = max(t − K, 0), to the next node s, in sigma:

    JVP = (x_t − x_r − (t − r)·v_r) / (t − r)²          (MeanFlow identity, from the past)
    û(t, s) = v_t + (s − t)·JVP,       x_s = x_t + (s − t)·û

Between nodes the latent moves along û, which also stands for v_r where r was skipped. K = 1
reuses v_t.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.folding import Coefficients, Rows, Trace, rows_from
from meancache_trt.meancache.methods.base import Method


def _fold(sigmas: NDArray[np.float64], nodes: Sequence[int], spans: Sequence[int]) -> Rows:
    trace = Trace(latents=[np.zeros(len(nodes))])
    ends = [*nodes[1:], len(sigmas) - 1]
    moves = []
    for node, (start, end) in enumerate(zip(nodes, ends, strict=True)):
        velocity = np.eye(len(nodes))[node]
        jump = velocity + (sigmas[end] - sigmas[start]) * _jvp(sigmas, trace, start, spans[node])
        if end == start + 1:
            jump = velocity
        origin = trace.latents[start]
        for step in range(start, end):
            trace.velocities.append(velocity if step == start else jump)
            trace.latents.append(origin + (sigmas[step + 1] - sigmas[start]) * jump)
        moves.append((sigmas[end] - sigmas[start]) * jump)
    return rows_from(moves)


def _jvp(sigmas: NDArray[np.float64], trace: Trace, step: int, span: int) -> Coefficients:
    start = max(step - span, 0)
    if step - start <= 1:
        return np.zeros_like(trace.latents[0])
    window = sigmas[step] - sigmas[start]
    drift = trace.latents[step] - trace.latents[start] - window * trace.velocities[start]
    return np.asarray(drift / window**2)


METHOD = Method(
    "paper", "the paper's average-velocity jump", _fold, uses_spans=True, placement="path"
)
