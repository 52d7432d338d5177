"""Edge costs: how far a rule's jump from one step to another lands from the recorded trajectory.

For step t, target s and span K, with displacement d(t, s) = Σ Δσ·v over the recorded velocities
and its estimate d̂_K(t, s) from velocities up to t (see `estimators`):

    relative       ‖d − d̂_K‖ / ‖d‖       the paper's L_K(t, s), its Δσ cancelling
    displacement   ‖d − d̂_K‖ / ‖x_T‖     the same weighted with |Δσ|: the error that the edge leaves
                                           in the latent, as a fraction of the final latent

with the l1 norm of the paper, or the l2 norm, which needs no more than the velocities' Gram matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.estimators import EdgeWeights, weights_of
from meancache_trt.calibration.trajectories import Array, Trajectory
from meancache_trt.errors import CalibrationError

Scaling = Literal["displacement", "relative"]
Norm = Literal["l2", "l1"]

COLUMNS = 1024
"""Latent elements in work at once for l1 costs: 50 edges x 6 spans x 4 KiB stay in the cache."""


@dataclass(frozen=True)
class CostRule:
    """Which estimate is compared, and how its error is measured."""

    method: str
    scaling: Scaling = "displacement"
    norm: Norm = "l2"
    max_span: int = 6

    def describe(self) -> str:
        """The rule in a few words, as it is recorded in a schedule."""
        return f"{self.scaling} {self.norm}, spans to {self.max_span}"


@dataclass(frozen=True)
class EdgeCosts:
    """Costs of every edge over samples, in arrays (T, T + 1, K): node, target, span − 1.

    `mean` is infinite where there is no edge: backwards, with a span longer than the history, or
    with a span above 1 to the end of the grid (after the last node its velocity is reused).
    `squares` is the sum of squared costs over samples, for their spread.
    """

    mean: NDArray[np.float64]
    squares: NDArray[np.float64]
    samples: int

    def deviation(self) -> NDArray[np.float64]:
        """Standard deviation over samples; 0 where there is no edge, or one sample."""
        finite = np.where(np.isfinite(self.mean), self.mean, 0.0)
        spread = self.squares - self.samples * finite**2
        return np.asarray(np.sqrt(np.maximum(spread, 0) / max(self.samples - 1, 1)))

    def along(self, nodes: Sequence[int], spans: Sequence[int] | None) -> tuple[float, ...]:
        """Mean cost of each of the B intervals of a schedule, the last with span 1."""
        ends = [*nodes[1:], self.mean.shape[0]]
        ks = [*(spans or [1] * (len(nodes) - 1)), 1]
        return tuple(float(self.mean[t, s, k - 1]) for t, s, k in zip(nodes, ends, ks, strict=True))


def measure_costs(
    trajectories: Iterable[Trajectory], sigmas: NDArray[np.float64], rule: CostRule
) -> EdgeCosts:
    """Average `rule` over trajectories, one in memory at a time.

    Args:
        trajectories: recorded over the grid of `sigmas`.
        sigmas: T + 1 values, float64.
        rule: what to measure.

    Raises:
        CalibrationError: where there is no trajectory, one is for another number of steps, or a
            cost is not finite (a latent of zeros, say).
    """
    weights = weights_of(rule.method, sigmas, rule.max_span)
    total, squares, samples = np.zeros(weights.shape[:3]), np.zeros(weights.shape[:3]), 0
    for samples, trajectory in enumerate(trajectories, start=1):  # noqa: B007
        costs = _sample_costs(trajectory, sigmas, weights, rule)
        total += costs
        squares += costs**2
    if not samples:
        raise CalibrationError("expected at least one trajectory, found none; record some first")
    mean = np.where(_edges(weights.shape[:3]), total / samples, np.inf)
    return EdgeCosts(mean, squares, samples)


def _edges(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which edges exist; see `EdgeCosts`."""
    node, target, span = np.ogrid[: shape[0], : shape[1], 1 : shape[2] + 1]
    is_possible = (target > node) & (span <= node + 1)
    return np.asarray(is_possible & ((target < shape[0]) | (span == 1)))


def velocity_change(trajectories: Iterable[Trajectory]) -> NDArray[np.float64]:
    """Relative l1 change of the velocity from each step to the next, mean over samples, (T − 1,).

    What TeaCache-like rules accumulate. Raises `CalibrationError` where there is no trajectory.
    """
    changes = [
        np.abs(np.diff(v, axis=0)).mean(1, dtype=np.float64)
        / np.abs(v[:-1]).mean(1, dtype=np.float64)
        for v in (trajectory.velocities for trajectory in trajectories)
    ]
    if not changes:
        raise CalibrationError("expected at least one trajectory, found none; record some first")
    return np.asarray(np.mean(changes, axis=0))


def _sample_costs(
    trajectory: Trajectory, sigmas: NDArray[np.float64], weights: EdgeWeights, rule: CostRule
) -> NDArray[np.float64]:
    """Costs of one sample, (T, T + 1, K); 0 where there is no edge."""
    steps = len(sigmas) - 1
    if len(trajectory.velocities) != steps:
        raise CalibrationError(
            f"expected trajectories of {steps} steps, found {len(trajectory.velocities)} for "
            f"{trajectory.prompt.text!r}; calibrate from recordings over one grid"
        )
    measure = _errors_l1 if rule.norm == "l1" else _errors_l2
    errors, lengths = measure(trajectory.velocities, np.diff(sigmas), weights)
    if rule.scaling == "displacement":
        order = 1 if rule.norm == "l1" else 2
        lengths = np.full_like(lengths, np.linalg.norm(trajectory.final.astype(float), order))
    edges = _edges(weights.shape[:3])
    costs = np.divide(errors, lengths[..., None], out=np.zeros_like(errors), where=edges)
    costs[np.arange(steps), np.arange(1, steps + 1)] = 0.0  # one step: the velocity itself
    if not np.isfinite(costs).all():
        raise CalibrationError(
            f"the recording of {trajectory.prompt.text!r} (seed {trajectory.prompt.seed}) has edge "
            "costs that are not finite; delete it and record again"
        )
    return costs


def _errors_l1(
    velocities: Array, widths: NDArray[np.float64], weights: EdgeWeights
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """‖d − d̂‖₁, (T, T + 1, K), and ‖d‖₁, (T, T + 1)."""
    errors, lengths = np.zeros(weights.shape[:3]), np.zeros(weights.shape[:2])
    factors, moves = weights.astype(np.float32), widths.astype(np.float32)[:, None]
    for first in range(0, velocities.shape[1], COLUMNS):
        block = np.ascontiguousarray(velocities[:, first : first + COLUMNS])
        for step in range(len(block)):
            displaced = np.cumsum(moves[step:] * block[step:], axis=0)
            estimated = _estimates(factors[step, step + 1 :], block[: step + 1])
            estimated -= displaced[:, None]
            errors[step, step + 1 :] += np.abs(estimated, out=estimated).sum(-1)
            lengths[step, step + 1 :] += np.abs(displaced).sum(-1)
    return errors, lengths


def _estimates(factors: Array, past: Array) -> Array:
    """Displacements (S, K, N) from weights (S, K, R) and the velocities up to t, (t + 1, N)."""
    reach = min(factors.shape[-1], len(past))
    window = past[len(past) - reach :][::-1]
    return np.asarray(factors[..., :reach] @ window)


def _errors_l2(
    velocities: Array, widths: NDArray[np.float64], weights: EdgeWeights
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """‖d − d̂‖₂, (T, T + 1, K), and ‖d‖₂, (T, T + 1), from the Gram matrix of the velocities."""
    gram = gram_matrix(velocities)
    errors, lengths = np.zeros(weights.shape[:3]), np.zeros(weights.shape[:2])
    for step in range(len(gram)):
        moves = np.tril(np.broadcast_to(widths[step:], (len(gram) - step,) * 2))
        displaced = moves @ gram[step:]
        squared = np.einsum("sn,sn->s", displaced[:, step:], moves)
        reach = min(weights.shape[-1], step + 1)
        window = slice(step + 1 - reach, step + 1)
        factors = weights[step, step + 1 :, :, :reach][..., ::-1]  # oldest velocity first
        cross = np.einsum("skr,sr->sk", factors, displaced[:, window])
        own = np.einsum("skr,skr->sk", factors @ gram[window, window], factors)
        errors[step, step + 1 :] = np.maximum(squared[:, None] - 2 * cross + own, 0)
        lengths[step, step + 1 :] = np.maximum(squared, 0)
    return np.sqrt(errors), np.sqrt(lengths)


def gram_matrix(velocities: Array) -> NDArray[np.float64]:
    """Inner products of velocities (T, N) in float64, (T, T).

    Float64 because costs are differences of these: in float32 errors below 3e-4 would drown.
    """
    gram = np.zeros((len(velocities),) * 2)
    for first in range(0, velocities.shape[1], 64 * COLUMNS):
        block = velocities[:, first : first + 64 * COLUMNS].astype(np.float64)
        gram += block @ block.T
    return gram
