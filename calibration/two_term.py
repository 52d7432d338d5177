"""Edges fitted by least squares: from the velocity at a node and at the node before it.

An edge from node t to s, whose node before is r, moves the latent by a·v_t + b·v_r. Of all weights
these leave the least error

    ‖a·v_t + b·v_r − Σ_k h_k·v_k‖      k from t to s − 1, h_k = σ_{k+1} − σ_k

over recorded trajectories, pulled towards plain reuse (a = σ_s − σ_t, b = 0) by a ridge. All of it
follows from the velocities' Gram matrix in closed form, for all edges at once. The target is the
sum of recorded steps: a difference of recorded latents would bring their rounding in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.costs import gram_matrix
from meancache_trt.calibration.trajectories import Trajectory
from meancache_trt.errors import CalibrationError

RIDGE = 1e-7
"""Of the mean squared norm of the two velocities; enough where they are equal."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class TwoTermEdges:
    """Every edge (t, p, q): at node t, with the node before at t − p, to the target t + q.

    p = 0 means that there is no node before (t = 0). `weights` (T, L + 1, L + 1, 2) are those of
    v_t and v_{t−p}; `costs` (T, L + 1, L + 1) are the errors that they leave, root mean square over
    samples as a fraction of the final latent, and infinite where there is no edge.
    """

    weights: Matrix
    costs: Matrix


def two_term_edges(
    gram: Matrix,
    sigmas: Matrix,
    *,
    longest: int | None = None,
    is_consistent: bool = False,
    ridge: float = RIDGE,
) -> TwoTermEdges:
    """Fit every edge of at most `longest` steps after and before its node.

    Args:
        gram: (T, T), from `refit.mean_gram`.
        sigmas: (T + 1,), float64.
        longest: L; by default T.
        is_consistent: whether weights sum to σ_s − σ_t, so that a constant velocity is exact.
        ridge: what deviating from plain reuse costs, relative to the velocities' mean square.

    Raises:
        CalibrationError: where the Gram matrix is of another grid, or not finite.
    """
    _check(gram, sigmas)
    grid = _Edges(sigmas, min(longest or len(gram), len(gram)))
    residual = grid.residual(gram)
    fit = _consistent if is_consistent else _free
    change = fit(residual, ridge, has_other=grid.back > 0)
    weights = np.stack([grid.width + change[..., 0], change[..., 1]], -1)
    return TwoTermEdges(weights, np.where(grid.is_edge, grid.errors(residual, change), np.inf))


def peak_costs(
    trajectories: Iterable[Trajectory], sigmas: Matrix, edges: TwoTermEdges, gammas: Sequence[float]
) -> list[Matrix]:
    """Costs of `edges` for each γ: the γ-mean of their errors over samples, (T, L + 1, L + 1).

    With cost^γ summed along a path, γ then suppresses single bad samples as it does single bad
    edges. One trajectory is in memory at a time; each needs a final latent that is not zero.
    """
    grid = _Edges(sigmas, edges.costs.shape[1] - 1)
    change = edges.weights - np.stack([grid.width, np.zeros_like(grid.width)], -1)
    totals, samples = [np.zeros_like(edges.costs) for _ in gammas], 0
    for samples, trajectory in enumerate(trajectories, start=1):  # noqa: B007
        norm = np.linalg.norm(trajectory.final.astype(np.float64))
        residual = grid.residual(gram_matrix(trajectory.velocities) / norm**2)
        errors = grid.errors(residual, change)
        totals = [total + errors**gamma for total, gamma in zip(totals, gammas, strict=True)]
    return [
        np.where(grid.is_edge, (total / max(samples, 1)) ** (1 / gamma), np.inf)
        for total, gamma in zip(totals, gammas, strict=True)
    ]


class _Edges:
    """Every edge (t, p, q) of a grid; arrays that broadcast to (T, L + 1, L + 1)."""

    def __init__(self, sigmas: Matrix, reach: int) -> None:
        steps = len(sigmas) - 1
        self._sigmas = sigmas
        self.node, self.back, self.ahead = np.ogrid[:steps, : reach + 1, : reach + 1]
        self.before = np.maximum(self.node - self.back, 0)
        self.target = np.minimum(self.node + self.ahead, steps)
        self.width = sigmas[self.target] - sigmas[self.node] + np.zeros((1, reach + 1, 1))
        has_before = np.where(self.back > 0, self.node >= self.back, self.node == 0)
        self.is_edge = (self.ahead > 0) & (self.node + self.ahead <= steps) & has_before

    def residual(self, gram: Matrix) -> _Residual:
        """What plain reuse leaves on velocities with this Gram matrix."""
        node, before, target = self.node, self.before, self.target
        moments = _Moments(gram, self._sigmas)
        return _Residual(
            own=gram[node, node],
            cross=gram[node, before],
            other=gram[before, before],
            own_miss=moments.toward(node, target, node) - self.width * gram[node, node],
            other_miss=moments.toward(node, target, before) - self.width * gram[node, before],
            square=moments.reuse_error(node, target, self.width),
        )

    def errors(self, residual: _Residual, change: Matrix) -> Matrix:
        """What is left after `change`; a single step is the recorded velocity itself."""
        squares = np.where(self.ahead == 1, 0.0, np.maximum(residual.after(change), 0.0))
        return np.asarray(np.sqrt(squares))


class _Moments:
    """Inner products of displacements d(t, s) = Σ h_k·v_k with velocities and with each other."""

    def __init__(self, gram: Matrix, sigmas: Matrix) -> None:
        widths = np.diff(sigmas)
        self._gram = gram
        self._moved = np.vstack([np.zeros(len(gram)), np.cumsum(widths[:, None] * gram, axis=0)])
        self._both = np.hstack(
            [np.zeros((len(sigmas), 1)), np.cumsum(self._moved * widths, axis=1)]
        )

    def toward(
        self, start: NDArray[np.int64], end: NDArray[np.int64], at: NDArray[np.int64]
    ) -> Matrix:
        """⟨d(start, end), v_at⟩."""
        return np.asarray(self._moved[end, at] - self._moved[start, at])

    def reuse_error(
        self, node: NDArray[np.int64], target: NDArray[np.int64], width: Matrix
    ) -> Matrix:
        """‖d(node, target) − width·v_node‖²."""
        both = self._both
        own = both[target, target] - 2 * both[node, target] + both[node, node]
        across = self.toward(node, target, node)
        return np.asarray(own - 2 * width * across + width**2 * self._gram[node, node])


@dataclass(frozen=True)
class _Residual:
    """What plain reuse leaves: ‖e‖², ⟨e, v_t⟩ and ⟨e, v_r⟩, and the Gram matrix of v_t and v_r."""

    own: Matrix
    cross: Matrix
    other: Matrix
    own_miss: Matrix
    other_miss: Matrix
    square: Matrix

    def after(self, change: Matrix) -> Matrix:
        """‖e − change·(v_t, v_r)‖²."""
        a, b = change[..., 0], change[..., 1]
        explained = a * self.own_miss + b * self.other_miss
        spent = a**2 * self.own + 2 * a * b * self.cross + b**2 * self.other
        return np.asarray(self.square - 2 * explained + spent)


def _free(residual: _Residual, ridge: float, has_other: NDArray[np.bool_]) -> Matrix:
    """Both weights: the ridge's 2 x 2 system by Cramer's rule; v_t alone where there is no v_r."""
    other, cross = residual.other * has_other, residual.cross * has_other
    other_miss = residual.other_miss * has_other
    level = ridge * (residual.own + residual.other) / 2
    own, beside = residual.own + level, other + level
    determinant = own * beside - cross**2
    a = (beside * residual.own_miss - cross * other_miss) / determinant
    b = (own * other_miss - cross * residual.own_miss) / determinant
    return np.stack(np.broadcast_arrays(a, b), axis=-1)


def _consistent(residual: _Residual, ridge: float, has_other: NDArray[np.bool_]) -> Matrix:
    """What v_r is given v_t loses; nothing where there is no v_r."""
    level = ridge * (residual.own + residual.other) / 2
    spread = residual.own - 2 * residual.cross + residual.other + level
    b = has_other * (residual.other_miss - residual.own_miss) / spread
    return np.stack([-b, b], axis=-1)


def _check(gram: Matrix, sigmas: Matrix) -> None:
    steps = len(sigmas) - 1
    if gram.shape != (steps, steps):
        raise CalibrationError(
            f"expected a Gram matrix of {steps} velocities, found shape {gram.shape}; calibrate "
            "from recordings over one grid"
        )
    if not np.isfinite(gram).all() or not (np.diag(gram) > 0).all():
        raise CalibrationError(
            "expected finite velocities that are not zero, found others in the Gram matrix; "
            "record again"
        )
