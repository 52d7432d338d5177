"""The shortest path over edge costs, its spans refitted on the rows' own errors.

A method without edge costs of its own (see `estimators`) takes the path of plain reuse.
"""

from __future__ import annotations

from meancache_trt.calibration.choice import Choice, Choose
from meancache_trt.calibration.costs import CostRule, measure_costs
from meancache_trt.calibration.estimators import ESTIMATORS
from meancache_trt.calibration.path import shortest_path
from meancache_trt.calibration.placements.base import Placement, PlacementOptions, choose_spans
from meancache_trt.calibration.refit import interval_errors, mean_gram
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.meancache.methods import get_method

REUSE = "euler"
"""The method whose edge costs stand in for those that a method does not have."""


def cost_rule(options: PlacementOptions, method: str, steps: int) -> CostRule:
    """The edge costs of `method`, or of plain reuse where it has none."""
    known = method if method in ESTIMATORS else REUSE
    max_span = options.max_span if get_method(known).uses_spans else 1
    return CostRule(known, options.scaling, options.norm, min(max_span, steps))


def _place(trajectories: Trajectories, options: PlacementOptions) -> Choose:
    is_complete = options.method in ESTIMATORS and not get_method(options.method).uses_spans
    if is_complete or not options.is_refitted:
        return _as_measured(trajectories, options)
    return _refitted(trajectories, options)


def _as_measured(trajectories: Trajectories, options: PlacementOptions) -> Choose:
    """The path over the method's edge costs, its spans as they stand."""
    rule = cost_rule(options, options.method, trajectories.grid.steps)
    costs = measure_costs(trajectories, trajectories.grid.array(), rule)

    def choose(budget: int) -> Choice:
        path = shortest_path(costs.mean, budget, options.gamma)
        spans = path.spans if get_method(options.method).uses_spans else None
        return Choice(
            nodes=path.nodes,
            spans=spans,
            edge_costs=costs.along(path.nodes, spans),
            path_cost=path.cost,
            cost=rule.describe(),
            gamma=options.gamma,
        )

    return choose


def _refitted(trajectories: Trajectories, options: PlacementOptions) -> Choose:
    """The better of the method's path and that of reuse, each judged by its rows' own errors."""
    steps, sigmas = trajectories.grid.steps, trajectories.grid.array()
    own = cost_rule(options, options.method, steps)
    rules = {rule.method: rule for rule in (own, cost_rule(options, REUSE, steps))}
    graphs = [measure_costs(trajectories, sigmas, rule).mean for rule in rules.values()]
    gram = mean_gram(trajectories)
    best_spans = choose_spans(trajectories, options, gram)

    def refit(nodes: tuple[int, ...]) -> Choice:
        spans = best_spans(nodes)
        rows = get_method(options.method).fold(sigmas, nodes, spans)
        errors = interval_errors(gram, sigmas, nodes, rows)
        return Choice(
            nodes=nodes,
            spans=spans,
            edge_costs=tuple(errors.tolist()),
            path_cost=float((errors**options.gamma).sum()),
            cost=f"{own.describe()}, refitted on the rows' own errors",
            gamma=options.gamma,
        )

    def choose(budget: int) -> Choice:
        paths = [shortest_path(graph, budget, options.gamma) for graph in graphs]
        choices = [refit(path.nodes) for path in paths]
        return min(choices, key=lambda choice: choice.path_cost or 0.0)

    return choose


PLACEMENT = Placement("path", "the shortest path over edge costs", _place)
