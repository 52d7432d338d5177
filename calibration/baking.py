"""From recorded trajectories to schedules: choose nodes for a budget and bake the method's weights.

A method's strategy measures what it needs once, whatever the number of budgets, and then gives a
choice of nodes for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from meancache_trt.calibration.choice import Choice, Choose
from meancache_trt.calibration.costs import (
    CostRule,
    Norm,
    Scaling,
    measure_costs,
    velocity_change,
)
from meancache_trt.calibration.fitted import DEFAULT_GAMMAS, fitted_choices
from meancache_trt.calibration.path import shortest_path
from meancache_trt.calibration.refit import interval_errors, mean_gram, refit_spans
from meancache_trt.calibration.sequential_fit import FitOptions
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.methods import get_method
from meancache_trt.meancache.methods.threshold import select_nodes
from meancache_trt.meancache.schedule import FITTED, Evidence, Schedule, bake

# Chosen on the FLUX stand-in by `scripts/prove calibration-defaults`, whose record is
# docs/proof/calibration-defaults.json: mean PSNR over eight budgets from 25 to 5 of 50 steps.
# With these defaults it is 50.0 dB; `paper` 46.8, `euler` 46.6, `threshold` 44.8, evenly spaced
# Euler 45.0, and 46.8 with spans that are not refitted.
DEFAULT_METHOD = "official"
# Relative costs: 47.6.
DEFAULT_SCALING: Scaling = "displacement"
# l1: 50.6, all of it from B = 6; but l2 needs the velocities' Gram matrix only, and so stays cheap
# on latents of any size.
DEFAULT_NORM: Norm = "l2"
# 2: 50.0, 4: 49.9.
DEFAULT_GAMMA = 3.0
# 2: 49.9, 6: 50.1.
DEFAULT_MAX_SPAN = 3


@dataclass(frozen=True)
class BakeOptions:
    """How nodes are chosen; the defaults are the best measured (see the constants).

    `scaling`, `norm`, `gamma` and `max_span` act on methods with edge costs. `is_refitted` off
    takes nodes and spans from the edge costs alone, as the paper does. `gammas` and `fit` act on
    "fitted", which tries all of `gammas`.
    """

    method: str = DEFAULT_METHOD
    scaling: Scaling = DEFAULT_SCALING
    norm: Norm = DEFAULT_NORM
    gamma: float = DEFAULT_GAMMA
    max_span: int = DEFAULT_MAX_SPAN
    is_refitted: bool = True
    gammas: tuple[float, ...] = DEFAULT_GAMMAS
    fit: FitOptions = field(default_factory=FitOptions)


Strategy = Callable[[Trajectories, BakeOptions], Choose]


def bake_schedules(
    trajectories: Trajectories,
    budgets: Sequence[int],
    options: BakeOptions | None = None,
    network: VelocityField | None = None,
) -> tuple[Schedule, ...]:
    """Bake one schedule for each budget, named as "official-b10".

    Each carries the trajectories' settings, so that it is refused elsewhere, and its evidence.
    `network` is what was recorded; only "fitted" runs it, and has to have it.

    Raises:
        CalibrationError: for a method that does not choose nodes from trajectories, a budget
            outside 1 to T, trajectories that are not fit for use, or a network that is missing or
            another one.
    """
    options = options or BakeOptions()
    check_budgets(budgets, trajectories.grid.steps)
    started = time.perf_counter()
    choose = _chooser(trajectories, options, network)
    measured_s = time.perf_counter() - started
    return tuple(_bake(trajectories, options, choose, budget, measured_s) for budget in budgets)


def _bake(
    trajectories: Trajectories, options: BakeOptions, choose: Choose, budget: int, measured_s: float
) -> Schedule:
    started = time.perf_counter()
    choice = choose(budget)
    solved_s = time.perf_counter() - started
    settings = trajectories.settings
    evidence = Evidence(
        samples=len(trajectories),
        seconds=trajectories.seconds + measured_s + solved_s,
        network_evaluations=len(trajectories) * trajectories.grid.steps + choice.evaluations,
        cost=choice.cost,
        gamma=choice.gamma,
        edge_costs=choice.edge_costs,
        path_cost=choice.path_cost,
        held_out_error=choice.held_out_error,
    )
    if choice.rows is not None:
        return Schedule(
            name=f"{options.method}-b{budget}",
            family=settings.family,
            model=settings.model,
            grid=trajectories.grid,
            guidance_scale=settings.guidance_scale,
            precision=settings.precision,
            method=options.method,
            nodes=choice.nodes,
            history=max(map(len, choice.rows)),
            weights=choice.rows,
            calibration=evidence,
        )
    return bake(
        options.method,
        trajectories.grid,
        choice.nodes,
        choice.spans,
        family=settings.family,
        model=settings.model,
        guidance_scale=settings.guidance_scale,
        precision=settings.precision,
        calibration=evidence,
    )


def _shortest_path(trajectories: Trajectories, options: BakeOptions) -> Choose:
    """The path over the method's edge costs, its spans as they stand."""
    rule = _rule(options, options.method, trajectories.grid.steps)
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


def _refitted_path(trajectories: Trajectories, options: BakeOptions) -> Choose:
    """The better of the method's path and Euler's, each with spans refitted on its own history."""
    if not options.is_refitted:
        return _shortest_path(trajectories, options)
    steps, sigmas = trajectories.grid.steps, trajectories.grid.array()
    rules = [_rule(options, method, steps) for method in (options.method, "euler")]
    graphs = [measure_costs(trajectories, sigmas, rule).mean for rule in rules]
    gram = mean_gram(trajectories)

    def refit(nodes: tuple[int, ...]) -> Choice:
        spans = refit_spans(options.method, gram, sigmas, nodes, rules[0].max_span)
        rows = get_method(options.method).fold(sigmas, nodes, spans)
        errors = interval_errors(gram, sigmas, nodes, rows)
        return Choice(
            nodes=nodes,
            spans=spans,
            edge_costs=tuple(errors.tolist()),
            path_cost=float((errors**options.gamma).sum()),
            cost=f"{rules[0].describe()}, refitted on the rows' own errors",
            gamma=options.gamma,
        )

    def choose(budget: int) -> Choice:
        paths = [shortest_path(graph, budget, options.gamma) for graph in graphs]
        choices = [refit(path.nodes) for path in paths]
        return min(choices, key=lambda choice: choice.path_cost or 0.0)

    return choose


def _rule(options: BakeOptions, method: str, steps: int) -> CostRule:
    max_span = options.max_span if get_method(method).uses_spans else 1
    return CostRule(method, options.scaling, options.norm, min(max_span, steps))


def _accumulated_change(trajectories: Trajectories, _options: BakeOptions) -> Choose:
    change = velocity_change(trajectories)
    return lambda budget: Choice(nodes=select_nodes(change, budget))


STRATEGIES: dict[str, Strategy] = {
    "official": _refitted_path,
    "paper": _refitted_path,
    "euler": _shortest_path,
    "threshold": _accumulated_change,
}
"""Method -> how its nodes are chosen."""


def _chooser(
    trajectories: Trajectories, options: BakeOptions, network: VelocityField | None
) -> Choose:
    if options.method == FITTED:
        if network is None:
            raise CalibrationError(
                "fitted schedules run the network along their own trajectories, found none; give "
                "the bundle of the model that was recorded"
            )
        return fitted_choices(trajectories, network, options.gammas, options.fit)
    return _strategy(options.method)(trajectories, options)


def _strategy(method: str) -> Strategy:
    if method not in STRATEGIES:
        raise CalibrationError(
            f"method {method!r} does not choose its nodes from trajectories; expected one of "
            f"{', '.join([*STRATEGIES, FITTED])}, or bake it with explicit nodes"
        )
    return STRATEGIES[method]


def check_budgets(budgets: Sequence[int], steps: int) -> None:
    """Raise `CalibrationError` for a budget outside 1 to `steps`."""
    for budget in budgets:
        if not 1 <= budget <= steps:
            raise CalibrationError(
                f"a budget is 1 to {steps} evaluations on this grid, found {budget}"
            )
