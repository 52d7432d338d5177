"""The path whose costliest edge is the least, over the edge costs of `shortest`."""

from __future__ import annotations

from meancache_trt.calibration.choice import Choice, Choose
from meancache_trt.calibration.costs import measure_costs
from meancache_trt.calibration.path import minimax_path
from meancache_trt.calibration.placements.base import Placement, PlacementOptions
from meancache_trt.calibration.placements.shortest import cost_rule
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.meancache.methods import get_method


def _place(trajectories: Trajectories, options: PlacementOptions) -> Choose:
    rule = cost_rule(options, options.method, trajectories.grid.steps)
    costs = measure_costs(trajectories, trajectories.grid.array(), rule)

    def choose(budget: int) -> Choice:
        path = minimax_path(costs.mean, budget)
        spans = path.spans if get_method(options.method).uses_spans else None
        return Choice(
            nodes=path.nodes,
            spans=spans,
            edge_costs=costs.along(path.nodes, spans),
            path_cost=path.cost,
            cost=f"{rule.describe()}, costliest edge first",
            gamma=1.0,  # the path's cost is the plain sum, which is what decides between equals
        )

    return choose


PLACEMENT = Placement("minimax", "the path whose costliest edge is the least", _place)
