"""From recorded trajectories to schedules: choose nodes for a budget and bake the method's weights.

How a method's nodes are placed is its own data (`Method.placement`) or an option; the ways are in
`calibration.placements`. Fitted schedules choose nodes and weights together, by `fitted`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.choice import Choice, Choose
from meancache_trt.calibration.costs import Norm, Scaling
from meancache_trt.calibration.fidelity import Judge, Outcome, judging
from meancache_trt.calibration.fitted import DEFAULT_GAMMAS, check_field, fitted_choices
from meancache_trt.calibration.placements import Placement, get_placement
from meancache_trt.calibration.sequential_fit import FitOptions
from meancache_trt.calibration.stability import edge_stability
from meancache_trt.calibration.target import Found, Goal, smallest_budget
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.evidence import Evidence, Target
from meancache_trt.meancache.methods import METHODS, get_method
from meancache_trt.meancache.schedule import FITTED, Schedule, bake
from meancache_trt.meancache.sigmas import SigmaGrid

DEFAULT_METHOD = FITTED
"""The best of all methods at every budget on the stand-ins (`scripts/prove fitted-schedules`)."""

# For `official`, on the FLUX stand-in by `scripts/prove calibration-defaults`, whose record is
# docs/proof/calibration-defaults.json: mean PSNR over eight budgets from 25 to 5 of 50 steps.
# With these defaults it is 50.0 dB, and 46.8 with spans that are not refitted.
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


@dataclass(frozen=True)
class Baked:
    """A schedule, and what its table did on the samples where the network was run."""

    schedule: Schedule
    outcome: Outcome | None


class Baker:
    """Bakes schedules of any budget from one recording; make it by `baking`."""

    def __init__(
        self,
        trajectories: Trajectories,
        options: BakeOptions,
        judge: Judge | None,
        started: float,
    ) -> None:
        self._trajectories, self._options, self._judge = trajectories, options, judge
        self._placement = _placement(options, judge)
        self._choose = self._placement.place(trajectories, options)
        self._stability = edge_stability(trajectories)
        self._noise_floor = None if judge is None else judge.noise_floor()
        self._seconds = trajectories.seconds + time.perf_counter() - started

    def bake(self, budget: int) -> Baked:
        """Bake one schedule. Raises what `bake_schedules` does."""
        check_budgets([budget], self._trajectories.grid.steps)
        started = time.perf_counter()
        choice = self._choose(budget)
        schedule = self._schedule(choice, self._placement.grid_of(self._trajectories.grid, budget))
        outcome, euler = self._outcomes(choice, schedule)
        ran = [
            found
            for found, known in ((outcome, choice.outcome), (euler, outcome))
            if found is not None and found is not known
        ]
        evidence = Evidence(
            samples=len(self._trajectories),
            seconds=self._seconds + time.perf_counter() - started,
            network_evaluations=self._recorded_evaluations
            + choice.evaluations
            + sum(found.evaluations for found in ran),
            candidates=choice.candidates + len(ran),
            cost=choice.cost,
            gamma=choice.gamma,
            edge_costs=choice.edge_costs,
            path_cost=choice.path_cost,
            fidelity=None if outcome is None else outcome.fidelity(),
            euler=None if euler is None else euler.fidelity(),
            noise_floor=self._noise_floor,
            stability=self._stability,
        )
        return Baked(msgspec.structs.replace(schedule, calibration=evidence), outcome)

    @property
    def _recorded_evaluations(self) -> int:
        """Those of the recording, and of checking the network against it."""
        steps = self._trajectories.grid.steps
        checks = 0 if self._judge is None else steps
        return len(self._trajectories) * steps + checks

    def _outcomes(
        self, choice: Choice, schedule: Schedule
    ) -> tuple[Outcome | None, Outcome | None]:
        """Of the schedule and of Euler on its nodes, where the network can tell."""
        grid = self._trajectories.grid
        is_exact = schedule.budget == grid.steps and schedule.method in (FITTED, "euler")
        if self._judge is None or schedule.grid != grid or is_exact:
            return None, None
        outcome = choice.outcome or self._judge.follow(schedule.nodes, schedule.weights)
        euler = outcome if schedule.method == "euler" else self._judge.euler(schedule.nodes)
        return outcome, euler

    def _schedule(self, choice: Choice, grid: SigmaGrid) -> Schedule:
        settings, method = self._trajectories.settings, self._options.method
        name = f"{_label(self._options)}-b{len(choice.nodes)}"
        if choice.rows is not None:
            return Schedule(
                name=name,
                family=settings.family,
                model=settings.model,
                grid=grid,
                guidance_scale=settings.guidance_scale,
                guidance_range=settings.guidance_range,
                precision=settings.precision,
                method=method,
                nodes=choice.nodes,
                history=max(map(len, choice.rows)),
                weights=choice.rows,
            )
        return bake(
            method,
            grid,
            choice.nodes,
            choice.spans,
            name=name,
            family=settings.family,
            model=settings.model,
            guidance_scale=settings.guidance_scale,
            guidance_range=settings.guidance_range,
            precision=settings.precision,
        )


@contextlib.contextmanager
def baking(
    trajectories: Trajectories,
    options: BakeOptions | None = None,
    network: VelocityField | None = None,
) -> Iterator[Baker]:
    """A baker of the recording; see `bake_schedules`.

    Raises:
        CalibrationError: for an unknown placement, or a network that is missing or another one.
        ScheduleError: for an unknown method.
    """
    started = time.perf_counter()
    options = options or BakeOptions()
    with contextlib.ExitStack() as stack:
        judge = None
        if network is not None:
            check_field(trajectories, network)
            judge = stack.enter_context(judging(trajectories, network))
        yield Baker(trajectories, options, judge, started)


def bake_schedules(
    trajectories: Trajectories,
    budgets: Sequence[int],
    options: BakeOptions | None = None,
    network: VelocityField | None = None,
) -> tuple[Schedule, ...]:
    """Bake one schedule for each budget.

    They are named as "official-b10", or as "ab2-path-b10" where the placement is not the method's
    own. Each carries the trajectories' settings, so that it is refused elsewhere, and its evidence.
    `network` is what was recorded. With it the evidence says how close pictures come, for which it
    is run on all samples; "fitted" has to have it.

    Raises:
        CalibrationError: for an unknown placement, or one that the grid does not allow, a budget
            outside 1 to T, trajectories that are not fit for use, or a network that is missing or
            another one.
        ScheduleError: for an unknown method.
    """
    check_budgets(budgets, trajectories.grid.steps)
    with baking(trajectories, options, network) as baker:
        return tuple(baker.bake(budget).schedule for budget in budgets)


def bake_for_goal(
    trajectories: Trajectories,
    goal: Goal,
    options: BakeOptions | None = None,
    network: VelocityField | None = None,
) -> tuple[Schedule, tuple[Schedule, ...]]:
    """Bake for the smallest budget that reaches a goal on held-out samples.

    Returns:
        That schedule, and all that were tried on the way, by budget. Fitted, every step reaches
        any goal.

    Raises:
        CalibrationError: as `bake_schedules`; without a network, by which alone pictures can be
            told; for a method on a grid of its own; and where the method does not reach the goal.
    """
    if network is None:
        raise CalibrationError(
            f"{goal.describe()} can only be judged in pictures, found no network to make them; "
            "give the bundle of the model that was recorded"
        )

    with baking(trajectories, options, network) as baker:

        def measure(budget: int) -> tuple[Schedule, NDArray[np.float64] | None]:
            baked = baker.bake(budget)
            if baked.outcome is None and baked.schedule.grid != trajectories.grid:
                raise CalibrationError(
                    f"{goal.describe()} is judged on the recorded grid, found "
                    f"{baked.schedule.method!r} on a grid of its own; give a budget, or another "
                    "placement"
                )
            return baked.schedule, None if baked.outcome is None else baked.outcome.psnr

        found, tried = smallest_budget(measure, trajectories.grid.steps, goal)
    if found.confidence < goal.confidence:
        raise CalibrationError(
            f"no budget up to {found.budget} is sure to reach {goal.describe()} with method "
            f"{found.result.method!r}, found probability {found.confidence:.2f} there; take method "
            f"{FITTED!r}, whose every step is exact"
        )
    return _chosen_for(found, goal), tuple(_chosen_for(entry, goal) for entry in tried)


def _chosen_for(found: Found[Schedule], goal: Goal) -> Schedule:
    """The schedule, whose evidence says how probable it is that it reaches the goal."""
    target = Target(psnr=goal.psnr, percentile=goal.percentile, confidence=found.confidence)
    assert found.result.calibration is not None
    evidence = msgspec.structs.replace(found.result.calibration, target=target)
    return msgspec.structs.replace(found.result, calibration=evidence)


def _label(options: BakeOptions) -> str:
    """The method, with the placement where that is not its own."""
    is_own = options.method == FITTED or options.placement in (
        None,
        get_method(options.method).placement,
    )
    return options.method if is_own else f"{options.method}-{options.placement}"


def _placement(options: BakeOptions, judge: Judge | None) -> Placement:
    if options.method != FITTED:
        return get_placement(options.placement or get_method(options.method).placement)
    if options.placement is not None:
        raise CalibrationError(
            f"fitted schedules choose their own nodes, found placement {options.placement!r}; "
            "leave it out"
        )
    if judge is None:
        raise CalibrationError(
            "fitted schedules run the network along their own trajectories, found none; give "
            "the bundle of the model that was recorded, or choose another method"
        )

    def place(_trajectories: Trajectories, _options: object) -> Choose:
        return fitted_choices(judge, options.gammas, options.fit)

    return Placement(FITTED, "the shortest path over pairs of fitted edges", place)


def check_budgets(budgets: Sequence[int], steps: int) -> None:
    """Raise `CalibrationError` for a budget outside 1 to `steps`."""
    for budget in budgets:
        if not 1 <= budget <= steps:
            raise CalibrationError(
                f"a budget is 1 to {steps} evaluations on this grid, found {budget}"
            )
