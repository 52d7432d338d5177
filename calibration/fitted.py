"""Fitted schedules: nodes by two-term edges, weights along the table's own trajectories.

The path's cost knows nothing of what errors become later, so which γ is best is tried: the tables
of all candidates are fitted, and the one whose held-out pictures are best is taken. γ acts on edges
and on samples alike: the path minimises the sum over edges of the mean over samples of error^γ, so
that a large γ avoids the single bad edge of a single bad sample.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.choice import Choice, Choose
from meancache_trt.calibration.fidelity import Judge
from meancache_trt.calibration.pair_path import edge_limit, shortest_pair_path
from meancache_trt.calibration.refit import mean_gram
from meancache_trt.calibration.sequential_fit import FitOptions
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.two_term import peak_costs, two_term_edges
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.folding import interval_widths

DEFAULT_GAMMAS = (1.0, 2.0, 6.0)

FIELD_TOLERANCE = 0.05
"""Relative distance of the field's velocity from the recorded one at the same latent: 1e-5 in
float32 on the FLUX stand-in, and a rounded network is within 0.02; more is another network."""


@dataclass(frozen=True)
class _Candidate:
    nodes: tuple[int, ...]
    gamma: float
    edge_costs: tuple[float, ...]
    path_cost: float


def fitted_choices(
    judge: Judge,
    gammas: Sequence[float] = DEFAULT_GAMMAS,
    options: FitOptions | None = None,
) -> Choose:
    """How the nodes and rows of any budget are chosen.

    A choice takes N·(B − 1) evaluations for each distinct path; there are at most as many as
    `gammas`, each a candidate.

    Raises:
        CalibrationError: by the choice, what `fit_rows` does.
    """
    fit = options or FitOptions()
    trajectories = judge.trajectories
    gram, sigmas = mean_gram(trajectories), trajectories.grid.array()

    @functools.cache
    def costs(longest: int) -> list[NDArray[np.float64]]:
        edges = two_term_edges(gram, sigmas, longest=longest, is_consistent=fit.is_consistent)
        return peak_costs(trajectories, sigmas, edges, gammas)

    def choose(budget: int) -> Choice:
        if budget == trajectories.grid.steps:
            return _every_step(sigmas, fit)
        measured = costs(edge_limit(trajectories.grid.steps, budget))
        candidates = _candidates(measured, budget, gammas)
        outcomes = [judge.fit(tried.nodes, fit) for tried in candidates]
        best = max(range(len(outcomes)), key=lambda index: outcomes[index].score)
        return Choice(
            nodes=candidates[best].nodes,
            rows=outcomes[best].rows,
            edge_costs=candidates[best].edge_costs,
            path_cost=candidates[best].path_cost,
            cost=_describe(fit),
            gamma=candidates[best].gamma,
            outcome=outcomes[best],
            candidates=len(gammas),
            evaluations=sum(outcome.evaluations for outcome in outcomes),
        )

    return choose


def check_field(trajectories: Trajectories, field: VelocityField) -> None:
    """Raise `CalibrationError` where the field has another velocity than was recorded.

    Compared in the middle of the first sample's trajectory, where guidance, text and timestep all
    show; one evaluation.
    """
    sample = next(iter(trajectories))
    step = trajectories.grid.steps // 2
    moved = np.tensordot(np.diff(trajectories.grid.array())[:step], sample.velocities[:step], 1)
    latent = (sample.initial + moved).astype(np.float32)
    found = field([sample.prompt], latent[None], step)[0].astype(np.float64)
    recorded = sample.velocities[step].astype(np.float64)
    gap = float(np.linalg.norm(found - recorded) / np.linalg.norm(recorded))
    if not gap <= FIELD_TOLERANCE:
        raise CalibrationError(
            f"the network's velocity at step {step} for {sample.prompt.text!r} is {gap:.1%} away "
            "from the recorded one; expected the network, guidance scale and text length that were "
            "recorded. Record again with them"
        )


def _candidates(
    costs: Sequence[NDArray[np.float64]], budget: int, gammas: Sequence[float]
) -> list[_Candidate]:
    """The distinct paths, each with the first γ that leads to it."""
    made: dict[tuple[int, ...], _Candidate] = {}
    for cost, gamma in zip(costs, gammas, strict=True):
        path = shortest_pair_path(cost, budget, gamma)
        along = tuple(float(cost[edge]) for edge in _edges_of(path.nodes, len(cost)))
        made.setdefault(path.nodes, _Candidate(path.nodes, gamma, along, path.cost))
    return list(made.values())


def _edges_of(nodes: Sequence[int], steps: int) -> list[tuple[int, int, int]]:
    """(node, steps back to the node before, steps to the next) of every edge."""
    before = (nodes[0], *nodes)
    triples = zip(before, itertools.pairwise((*nodes, steps)), strict=False)
    return [(node, node - last, target - node) for last, (node, target) in triples]


def _every_step(sigmas: NDArray[np.float64], fit: FitOptions) -> Choice:
    """Nothing is skipped: the recording itself, bit for bit, and no reason to run the network."""
    nodes = tuple(range(len(sigmas) - 1))
    rows = tuple((width,) for width in interval_widths(sigmas, nodes).tolist())
    zeros = (0.0,) * len(nodes)
    return Choice(nodes, rows=rows, edge_costs=zeros, path_cost=0.0, cost=_describe(fit))


def _describe(fit: FitOptions) -> str:
    kind = (
        "two-term least squares, weights summing to the step"
        if fit.is_consistent
        else ("two-term least squares")
    )
    return f"{kind}; rows fitted along their own trajectories, history {fit.history}"
