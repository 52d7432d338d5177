"""DPM-Solver++(2M) on the nodes (arXiv 2211.01095), as diffusers runs it on flow matching.

With alpha = 1 − σ and λ = log(alpha / σ), a velocity says where the image is, m_n = x_n − σ_n·v_n.
From node s to the next t, with h = λ_t − λ_s and −alpha_t·(exp(−h) − 1) = 1 − σ_t/σ_s:

    x_t = (σ_t/σ_s)·x_s + (1 − σ_t/σ_s)·(m_n + h / (2·h_before)·(m_n − m_{n−1}))        (midpoint)

The first interval and the last are of first order (`lower_order_final`), which is Euler's method.
λ is −inf at σ = 1, where h / h_before has the limit 0.

m_n − m_{n−1} contains the last move of the latent, and so the difference before it: rows read
nearly all velocities so far, with weights that fall geometrically.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.folding import Coefficients, Rows, rows_from
from meancache_trt.meancache.methods.base import Method


def half_log_snr(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """λ = log((1 − σ) / σ): −inf at 1 (or above, by a rounding), inf at 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.maximum(1 - levels, 0)) - np.log(levels))


def growth(snr: NDArray[np.float64], interval: int) -> float | None:
    """The ratio h / h_before at an interval between nodes, or None where it is of first order.

    `snr` is λ at the B nodes and at the end of the grid, shape (B + 1,). An interval to σ = 0 that
    is not the last (of a grid whose last sigma repeats) is of first order too: there h is inf.
    """
    if not 0 < interval < len(snr) - 2 or not np.isfinite(snr[interval : interval + 2]).all():
        return None
    before, ahead = np.diff(snr[interval - 1 : interval + 2])
    return float(ahead / before) if before > 0 else None


def _fold(sigmas: NDArray[np.float64], nodes: Sequence[int], _spans: Sequence[int]) -> Rows:
    levels = np.append(sigmas[list(nodes)], sigmas[-1])
    snr = half_log_snr(levels)
    latent: Coefficients = np.zeros(len(nodes))
    images: list[Coefficients] = []
    moves: list[Coefficients] = []
    for n, velocity in enumerate(np.eye(len(nodes))):
        images.append(latent - levels[n] * velocity)
        move = (levels[n + 1] - levels[n]) * velocity
        ratio = growth(snr, n)
        if ratio is not None:
            move += (1 - levels[n + 1] / levels[n]) * ratio / 2 * (images[n] - images[n - 1])
        latent = latent + move
        moves.append(move)
    return rows_from(moves)


METHOD = Method("dpmpp2m", "DPM-Solver++(2M) on the nodes", _fold, placement="own-grid")
