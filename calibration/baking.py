"""From recorded trajectories to schedules: choose nodes for a budget and bake the method's weights.

How a method's nodes are placed is its own data (`Method.placement`) or an option; the ways are in
`calibration.placements`. Fitted schedules choose nodes and weights together, by `fitted`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from meancache_trt.calibration.choice import Choose
from meancache_trt.calibration.costs import Norm, Scaling
from meancache_trt.calibration.fitted import DEFAULT_GAMMAS, fitted_choices
from meancache_trt.calibration.placements import Placement, get_placement
from meancache_trt.calibration.sequential_fit import FitOptions
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.methods import METHODS, get_method
from meancache_trt.meancache.schedule import FITTED, Evidence, Schedule, bake
from meancache_trt.meancache.sigmas import SigmaGrid

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
    "fitted", which tries all of `gammas`. `placement` is one of `PLACEMENTS`; by default the
    method's own.
    """

    method: str = DEFAULT_METHOD
    scaling: Scaling = DEFAULT_SCALING
    norm: Norm = DEFAULT_NORM
    gamma: float = DEFAULT_GAMMA
    max_span: int = DEFAULT_MAX_SPAN
    is_refitted: bool = True
    gammas: tuple[float, ...] = DEFAULT_GAMMAS
    fit: FitOptions = field(default_factory=FitOptions)
    placement: str | None = None


def bakeable_methods() -> tuple[str, ...]:
    """Every method that `bake_schedules` takes, which is every one there is; "fitted" is last."""
    return (*METHODS, FITTED)


def bake_schedules(
    trajectories: Trajectories,
    budgets: Sequence[int],
    options: BakeOptions | None = None,
    network: VelocityField | None = None,
) -> tuple[Schedule, ...]:
    """Bake one schedule for each budget, named as "official-b10", or as "ab2-path-b10" where the
    placement is not the method's own.

    Each carries the trajectories' settings, so that it is refused elsewhere, and its evidence.
    `network` is what was recorded; only "fitted" runs it, and has to have it.

    Raises:
        CalibrationError: for an unknown placement, or one that the grid does not allow, a budget
            outside 1 to T, trajectories that are not fit for use, or a network that is missing or
            another one.
        ScheduleError: for an unknown method.
    """
    options = options or BakeOptions()
    check_budgets(budgets, trajectories.grid.steps)
    placement = _placement(options, network)
    started = time.perf_counter()
    choose = placement.place(trajectories, options)
    measured_s = time.perf_counter() - started
    baked = []
    for budget in budgets:
        grid = placement.grid_of(trajectories.grid, budget)
        baked.append(_bake(trajectories, options, grid, choose, budget, measured_s=measured_s))
    return tuple(baked)


def _bake(
    trajectories: Trajectories,
    options: BakeOptions,
    grid: SigmaGrid,
    choose: Choose,
    budget: int,
    *,
    measured_s: float,
) -> Schedule:
    started = time.perf_counter()
    choice = choose(budget)
    solved_s = time.perf_counter() - started
    settings = trajectories.settings
    name = f"{_label(options)}-b{budget}"
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
            name=name,
            family=settings.family,
            model=settings.model,
            grid=grid,
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
        grid,
        choice.nodes,
        choice.spans,
        name=name,
        family=settings.family,
        model=settings.model,
        guidance_scale=settings.guidance_scale,
        precision=settings.precision,
        calibration=evidence,
    )


def _label(options: BakeOptions) -> str:
    """The method, with the placement where that is not its own."""
    is_own = options.method == FITTED or options.placement in (
        None,
        get_method(options.method).placement,
    )
    return options.method if is_own else f"{options.method}-{options.placement}"


def _placement(options: BakeOptions, network: VelocityField | None) -> Placement:
    if options.method != FITTED:
        return get_placement(options.placement or get_method(options.method).placement)
    if options.placement is not None:
        raise CalibrationError(
            f"fitted schedules choose their own nodes, found placement {options.placement!r}; "
            "leave it out"
        )
    if network is None:
        raise CalibrationError(
            "fitted schedules run the network along their own trajectories, found none; give "
            "the bundle of the model that was recorded"
        )

    def place(trajectories: Trajectories, _options: object) -> Choose:
        return fitted_choices(trajectories, network, options.gammas, options.fit)

    return Placement(FITTED, "the shortest path over pairs of fitted edges", place)


def check_budgets(budgets: Sequence[int], steps: int) -> None:
    """Raise `CalibrationError` for a budget outside 1 to `steps`."""
    for budget in budgets:
        if not 1 <= budget <= steps:
            raise CalibrationError(
                f"a budget is 1 to {steps} evaluations on this grid, found {budget}"
            )
