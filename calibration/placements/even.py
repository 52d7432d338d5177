"""Nodes at even distances on the recorded grid, as far as its steps allow."""

from __future__ import annotations

from meancache_trt.calibration.choice import Choice, Choose
from meancache_trt.calibration.placements.base import Placement, PlacementOptions, choose_spans
from meancache_trt.calibration.trajectories import Trajectories


def even_nodes(steps: int, budget: int) -> tuple[int, ...]:
    """`budget` of `steps` steps, from step 0; distances differ by at most 1."""
    return tuple(node * steps // budget for node in range(budget))


def _place(trajectories: Trajectories, options: PlacementOptions) -> Choose:
    spans = choose_spans(trajectories, options)

    def choose(budget: int) -> Choice:
        nodes = even_nodes(trajectories.grid.steps, budget)
        return Choice(nodes, spans(nodes))

    return choose


PLACEMENT = Placement("even", "evenly spaced steps of the model's grid", _place)
