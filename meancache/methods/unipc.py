"""UniPC of order 2, B(h) = exp(h) − 1 (arXiv 2302.04867), as diffusers runs it on flow matching.

A step of DPM-Solver++(2M) predicts the latent at the next node. The velocity there says where the
image is, which corrects that latent before the next prediction, without an evaluation of its own:
so a row moves the latent from one predicted place to the next, and the network sees predicted
latents only. In the notation of `dpmpp2m`, with x_s the corrected latent at node s:

    x_t = x_s + (1 − σ_t/σ_s)·(m_s − x_s + ρ_1·(m_before − m_s)/r + ρ_c·(m_t − m_s))      corrected

r = (λ_before − λ_s)/h, and ρ solves ρ_1 + ρ_c = b_1, r·ρ_1 + ρ_c = b_2. Where the prediction was of
first order, ρ_1 = 0 and ρ_c = 1/2. Rows read all velocities so far, with falling weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.folding import Coefficients, Rows, rows_from
from meancache_trt.meancache.methods.base import Method
from meancache_trt.meancache.methods.dpmpp2m import growth, half_log_snr

HIGHEST_LEVEL = 1 - 1e-6
"""λ is taken here where σ is above: what diffusers 0.42.1 does, since the corrector has no λ of
−inf. The latent moves by σ itself."""


def _fold(sigmas: NDArray[np.float64], nodes: Sequence[int], _spans: Sequence[int]) -> Rows:
    levels = np.append(sigmas[list(nodes)], sigmas[-1])
    snr = half_log_snr(np.minimum(levels, HIGHEST_LEVEL))
    predicted: Coefficients = np.zeros(len(nodes))
    corrected = predicted
    images: list[Coefficients] = []
    moves: list[Coefficients] = []
    for n, velocity in enumerate(np.eye(len(nodes))):
        images.append(predicted - levels[n] * velocity)
        if n:
            towards = images[n - 1] - corrected + _correction(snr, images)
            corrected = corrected + _share(levels, n - 1) * towards
        further = predicted - corrected
        ratio = growth(snr, n)
        if ratio is not None:
            further = further + ratio / 2 * (images[n] - images[n - 1])
        # The velocity's own part is the exact difference, as in Euler's method.
        width = levels[n + 1] - levels[n]
        following = corrected + width * velocity + _share(levels, n) * further
        moves.append(following - predicted)
        predicted = following
    return rows_from(moves)


def _share(levels: NDArray[np.float64], interval: int) -> float:
    """1 − σ_t/σ_s; nothing is left to move at σ_s = 0."""
    start, end = levels[interval : interval + 2]
    return float(1 - end / start) if start else 0.0


def _correction(snr: NDArray[np.float64], images: Sequence[Coefficients]) -> Coefficients:
    """What the corrector adds to the image of the node before the last."""
    interval = len(images) - 2
    fresh = images[-1] - images[-2]
    ratio = growth(snr, interval)
    if ratio is None:
        return fresh / 2
    older, newest = _corrector_weights(float(snr[interval + 1] - snr[interval]), -1 / ratio)
    return older * -ratio * (images[-3] - images[-2]) + newest * fresh


def _corrector_weights(step: float, position: float) -> tuple[float, float]:
    """ρ_1 and ρ_c, for h and r."""
    grown = np.expm1(-step)
    first = -grown / step - 1
    second = -first / step - 0.5
    older = (first - 2 * second) / grown / (1 - position)
    return float(older), float(first / grown - older)


METHOD = Method("unipc", "UniPC of order 2, predictor and corrector", _fold, placement="own-grid")
