"""Fold any estimator of skipped velocities into weights over evaluated velocities.

Every estimator here is linear in the velocities and latents it reads, and every latent is the
starting latent plus a linear combination of evaluated velocities. So an integration over T steps
with B evaluations is known, before any network runs, as B rows of weights:

    x_next = x + Σ_j weights[n][j] · v_{n−j}          (v_{n−j}: velocity evaluated j nodes ago)

The fold runs the estimator's own recursion on coefficient vectors of length B in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import ScheduleError

Coefficients = NDArray[np.float64]
Rows = tuple[tuple[float, ...], ...]

NEGLIGIBLE = 1e-14
"""Weights below this are rounding residue of a float64 fold (weights are of the order of Δσ)."""


@dataclass
class Trace:
    """Velocity and latent at every step so far, each as coefficients over evaluated velocities.

    `velocities[i]` is what step i moves along, evaluated or estimated; `latents[i]` is the latent
    at step i less the starting latent. Both have shape (B,).
    """

    velocities: list[Coefficients] = field(default_factory=list)
    latents: list[Coefficients] = field(default_factory=list)


Estimate = Callable[[Trace, int, int], Coefficients]
"""(trace, step, index of the last node) -> velocity at a skipped step, shape (B,)."""


def fold_steps(sigmas: NDArray[np.float64], nodes: Sequence[int], estimate: Estimate) -> Rows:
    """Fold an estimator that is asked at every skipped step.

    Args:
        sigmas: T + 1 values, float64.
        nodes: the B evaluated steps, ascending from 0.
        estimate: called in order at each step that is not a node.

    Returns:
        B rows; row n holds the weights of v_n, v_{n−1}, …, without trailing zeros.
    """
    steps, budget = len(sigmas) - 1, len(nodes)
    trace = Trace(latents=[np.zeros(budget)])
    moves: list[Coefficients] = []
    for step in range(steps):
        if len(moves) < budget and nodes[len(moves)] == step:
            velocity = np.eye(budget)[len(moves)]
            moves.append(np.zeros(budget))
        else:
            velocity = estimate(trace, step, len(moves) - 1)
        move = (sigmas[step + 1] - sigmas[step]) * velocity
        moves[-1] = moves[-1] + move
        trace.velocities.append(velocity)
        trace.latents.append(trace.latents[-1] + move)
    return rows_from(moves)


def rows_from(moves: Sequence[Coefficients]) -> Rows:
    """Rows of weights, youngest velocity first, from displacement coefficients oldest first.

    `moves[n]`, shape (B,), must not touch velocities that are evaluated after node n.
    """
    return tuple(_trimmed(move[: n + 1][::-1]) for n, move in enumerate(moves))


def _trimmed(row: Coefficients) -> tuple[float, ...]:
    kept = np.where(np.abs(row) > NEGLIGIBLE, row, 0.0)
    used = np.flatnonzero(kept)
    last = int(used[-1]) if len(used) else 0
    return tuple(kept[: last + 1].tolist())


def interval_widths(sigmas: NDArray[np.float64], nodes: Sequence[int]) -> Coefficients:
    """Δσ from each node to the next, and from the last to the end of the grid, shape (B,)."""
    return np.diff(np.append(sigmas[list(nodes)], sigmas[-1]))


def check_nodes(nodes: Sequence[int], steps: int) -> None:
    """Raise `ScheduleError` unless `nodes` ascend from step 0 and stay below `steps`."""
    if not nodes or nodes[0] != 0:
        found = f"the list begins with {nodes[0]}" if nodes else "the list is empty"
        raise ScheduleError(
            f"a schedule evaluates the network at step 0, {found}; add node 0, since there is no "
            "earlier velocity to reuse"
        )
    for earlier, later in itertools.pairwise(nodes):
        if later <= earlier:
            raise ScheduleError(
                f"nodes are steps in ascending order, found {later} after {earlier}; sort them and "
                "drop repetitions"
            )
    if nodes[-1] >= steps:
        raise ScheduleError(
            f"nodes are steps of a grid of {steps} steps, 0 to {steps - 1}, found {nodes[-1]}; "
            "give a longer grid with --steps, or other nodes"
        )


def check_spans(spans: Sequence[int] | None, nodes: Sequence[int]) -> tuple[int, ...]:
    """Spans, one for each edge between nodes, with the last repeated for the end of the grid.

    Raises:
        ScheduleError: where their number is wrong, one is below 1, or one reaches back before
            step 0 (node k has k + 1 steps of history, itself included).
    """
    edges = len(nodes) - 1
    if spans is None and edges:
        raise ScheduleError(
            f"this method needs {edges} spans, one for each edge between nodes; give --spans"
        )
    spans = spans or ()
    if len(spans) != edges:
        raise ScheduleError(
            f"{len(nodes)} nodes have {edges} edges between them and need {edges} spans, found "
            f"{len(spans)}; give one span for each edge"
        )
    for node, span in zip(nodes, spans, strict=False):
        if not 1 <= span <= node + 1:
            raise ScheduleError(
                f"the span of the edge at node {node} is 1 to {node + 1} (the steps of history "
                f"there), found {span}; 1 reuses the velocity"
            )
    return (*spans, 1)
