"""Errors of a schedule's own rows, and spans chosen by them.

Edge costs assume that every step before an edge was evaluated. A schedule has evaluated its nodes
only, and its windows cover estimates: on the FLUX stand-in at B = 6, spans chosen by edge costs
alone end 11 dB below Euler (`scripts/prove calibration-defaults`). Here the folded rows themselves
are applied to recorded velocities, which still needs no network.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.costs import gram_matrix
from meancache_trt.calibration.trajectories import Trajectory
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.folding import Rows
from meancache_trt.meancache.methods import get_method

DISTINCT = 1e-9
"""A longer span has to lower the error by more than this fraction, which rounding does not."""


def mean_gram(trajectories: Iterable[Trajectory]) -> NDArray[np.float64]:
    """Inner products of velocities over ‖x_T‖², mean over samples, (T, T).

    Raises `CalibrationError` where there is no trajectory, or a final latent is zero.
    """
    total, samples = np.zeros(()), 0
    for samples, trajectory in enumerate(trajectories, start=1):  # noqa: B007
        norm = float(np.linalg.norm(trajectory.final.astype(np.float64)))
        if not norm > 0:
            raise CalibrationError(
                f"the final latent of {trajectory.prompt.text!r} is zero; leave this prompt out"
            )
        total = total + gram_matrix(trajectory.velocities) / norm**2
    if not samples:
        raise CalibrationError("expected at least one trajectory, found none; record some first")
    return np.asarray(total / samples)


def interval_errors(
    gram: NDArray[np.float64], sigmas: NDArray[np.float64], nodes: Sequence[int], rows: Rows
) -> NDArray[np.float64]:
    """How far each row lands from the recorded trajectory, given the recorded velocities, (B,).

    Root mean square over samples, as a fraction of the final latent. `gram` is from `mean_gram`.
    """
    places, widths = np.asarray(nodes), np.diff(sigmas)
    misses = np.zeros((len(nodes), len(widths)))
    for n, (start, end) in enumerate(itertools.pairwise([*nodes, len(widths)])):
        misses[n, start:end] = widths[start:end]
        misses[n, places[n::-1][: len(rows[n])]] -= rows[n]
    squares = np.einsum("nt,nt->n", misses @ gram, misses)
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def refit_spans(
    method: str,
    gram: NDArray[np.float64],
    sigmas: NDArray[np.float64],
    nodes: Sequence[int],
    max_span: int,
) -> tuple[int, ...]:
    """Choose B − 1 spans in order, each for the least error of its interval after those before.

    Spans are at most `max_span` and the history at their node; where several are equally good, the
    shortest is taken.
    """
    rule = get_method(method)
    spans = [1] * (len(nodes) - 1)
    for edge, node in enumerate(nodes[:-1]):
        if nodes[edge + 1] == node + 1:
            continue
        best = np.inf
        for span in range(1, min(max_span, node + 1) + 1):
            tried = [*spans[:edge], span, *spans[edge + 1 :]]
            rows = rule.fold(sigmas, nodes, tried)
            error = interval_errors(gram, sigmas, nodes, rows)[edge]
            if error < best * (1 - DISTINCT):
                best, spans = error, tried
    return tuple(spans)
