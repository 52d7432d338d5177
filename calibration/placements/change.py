"""Nodes where the velocity has changed by a threshold since the last (see `methods.threshold`)."""

from __future__ import annotations

from meancache_trt.calibration.choice import Choice, Choose
from meancache_trt.calibration.costs import velocity_change
from meancache_trt.calibration.placements.base import Placement, PlacementOptions, choose_spans
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.meancache.methods.threshold import select_nodes


def _place(trajectories: Trajectories, options: PlacementOptions) -> Choose:
    change, spans = velocity_change(trajectories), choose_spans(trajectories, options)

    def choose(budget: int) -> Choice:
        nodes = select_nodes(change, budget)
        return Choice(nodes, spans(nodes))

    return choose


PLACEMENT = Placement("change", "steps where the velocity has changed enough", _place)
