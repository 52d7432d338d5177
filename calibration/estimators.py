"""What each rule would move along an edge, given a fully evaluated history.

An estimate of the displacement from step t to step s reads only the last velocities up to t, so it
is a row of weights over them; which, depends on the grid and the span K alone. These weights are
computed once for all edges, and applied to any number of recorded trajectories.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import CalibrationError

EdgeWeights = NDArray[np.float64]
"""Shape (T, T + 1, K, R): [t, s, k − 1, j] is the weight of v_{t−j} in the estimated displacement
from step t to s with span k. Only s > t and k <= t + 1 have a meaning; the rest is 0."""

Estimator = Callable[[NDArray[np.float64], int], EdgeWeights]
"""(sigmas of shape (T + 1,), longest span) -> weights."""


def weights_of(name: str, sigmas: NDArray[np.float64], max_span: int) -> EdgeWeights:
    """Edge weights of the estimator called `name`. Raises `CalibrationError` listing all of them.

    With span 1, and on edges of a single step, every estimator reuses v_t.
    """
    if name not in ESTIMATORS:
        raise CalibrationError(
            f"method {name!r} has no edge costs; expected one of {', '.join(ESTIMATORS)}"
        )
    steps = len(sigmas) - 1
    weights = ESTIMATORS[name](sigmas, max_span)
    weights[:, :, 0] = 0
    weights[:, :, 0, 0] = _widths(sigmas)
    neighbours = np.arange(steps), np.arange(1, steps + 1)
    weights[neighbours] = weights[neighbours][:, :1]
    reachable = np.arange(steps + 1) > np.arange(steps)[:, None]
    has_history = np.arange(max_span) <= np.arange(steps)[:, None]
    mask = reachable[:, :, None] & has_history[:, None, :]
    return np.where(mask[..., None], weights, 0.0)


def _widths(sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
    """σ_s − σ_t, shape (T, T + 1)."""
    return np.asarray(sigmas[None, :] - sigmas[:-1, None])


def _reuse(sigmas: NDArray[np.float64], max_span: int) -> EdgeWeights:
    steps = len(sigmas) - 1
    weights = np.zeros((steps, steps + 1, max_span, 1))
    weights[..., 0] = _widths(sigmas)[..., None]
    return weights


def _paper_jump(sigmas: NDArray[np.float64], max_span: int) -> EdgeWeights:
    """(σ_s − σ_t)·v_t + (σ_s − σ_t)²·JVP, the window of K steps ending at t."""
    steps, widths = len(sigmas) - 1, _widths(sigmas)
    weights = np.zeros((steps, steps + 1, max_span, max_span + 1))
    weights[..., 0] = widths[..., None]
    for span in range(2, max_span + 1):
        for step in range(2, steps):
            jvp = _window_jvp(sigmas, max(step - span, 0), step)
            weights[step, :, span - 1, : len(jvp)] += widths[step, :, None] ** 2 * jvp
    return weights


def _window_jvp(sigmas: NDArray[np.float64], start: int, step: int) -> NDArray[np.float64]:
    """(x_t − x_r − W·v_r) / W² as weights of v_t, v_{t−1}, …, v_r, for r = start and t = step."""
    window = sigmas[step] - sigmas[start]
    drift = np.append(0.0, np.diff(sigmas[start : step + 1])[::-1])
    drift[-1] -= window
    return np.asarray(drift / window**2)


def _official_recursion(sigmas: NDArray[np.float64], max_span: int) -> EdgeWeights:
    """The authors' recursion over the steps that an edge skips (see `methods.official`)."""
    steps = len(sigmas) - 1
    weights = np.zeros((steps, steps + 1, max_span, max_span))
    for span in range(2, max_span + 1):
        for offset, moved in enumerate(_recursion(sigmas, span), start=1):
            nodes = np.arange(steps - offset + 1)
            weights[nodes, nodes + offset, span - 1, :span] = moved[nodes]
    return weights


def _recursion(sigmas: NDArray[np.float64], span: int) -> list[NDArray[np.float64]]:
    """Displacements after 1, 2, …, T steps from every node at once, each (T, span).

    Sigmas are continued on both sides, so that nodes with too little history, or too near the end,
    compute something finite; callers leave those out.
    """
    steps = len(sigmas) - 1
    before, after = np.arange(span, 0, -1.0), np.arange(1.0, steps + 1)
    padded = np.concatenate([sigmas[0] + before, sigmas, sigmas[-1] - after])

    def sigma(offset: int) -> NDArray[np.float64]:
        return padded[span + offset : span + offset + steps, None]

    units = np.broadcast_to(np.eye(span)[:, None], (span, steps, span))
    velocities = {-lag: units[lag] for lag in range(span)}
    latents = {1 - span: np.zeros((steps, span))}
    for offset in range(1 - span, steps):
        if offset > 0:
            start = offset - span
            window = sigma(offset) - sigma(start)
            drift = latents[offset] - latents[start] - window * velocities[start]
            slope = (sigma(offset + 1) - sigma(offset)) / window**2
            velocities[offset] = velocities[offset - 1] + slope * drift
        move = (sigma(offset + 1) - sigma(offset)) * velocities[offset]
        latents[offset + 1] = latents[offset] + move
    return [latents[offset] - latents[0] for offset in range(1, steps + 1)]


ESTIMATORS: dict[str, Estimator] = {
    "euler": _reuse,
    "official": _official_recursion,
    "paper": _paper_jump,
}
