"""Which schedules are measured: those of a bundle, or every method that can be baked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from meancache_trt import __version__
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import (
    STRATEGIES,
    BakeOptions,
    bake_schedules,
    check_budgets,
)
from meancache_trt.calibration.evaluation import row_key
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.errors import BundleError, InputError
from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.methods import METHODS
from meancache_trt.meancache.methods.threshold import fill_gaps
from meancache_trt.meancache.schedule import FITTED, Schedule, bake, load_schedule, save_schedule
from meancache_trt.meancache.sigmas import SigmaGrid
from meancache_trt.selection import calibrated_size
from meancache_trt.shapes import PictureSize

OWN_GRID = "fewer-steps"
"""Euler on the model's own grid of B steps: what a user does who has no schedule."""

Make = Callable[[int], Schedule]
"""Budget -> schedule."""


@dataclass(frozen=True)
class Competitor:
    """One method at one budget, whose schedule is made when it is its turn.

    `origin` is what the schedule follows from, in words, so that it is made once for the same; None
    where it costs nothing to make.
    """

    method: str
    budget: int
    make: Callable[[], Schedule]
    origin: str | None = None


def makers(
    trajectories: Trajectories,
    grid_of: Callable[[int], SigmaGrid],
    field: VelocityField | None,
) -> dict[str, Make]:
    """Every method that can be compared, by name: the one place that knows what there is.

    Those with a strategy choose their nodes from the recordings; `FITTED` does too, where there is
    a network to run. What has neither stands on evenly spaced nodes, unless it needs spans.
    """
    grid = trajectories.grid

    def calibrated(method: str) -> Make:
        options = BakeOptions(method=method)
        return lambda budget: bake_schedules(trajectories, [budget], options, field)[0]

    def even(method: str) -> Make:
        return lambda budget: bake(method, grid, fill_gaps((0,), budget, grid.steps))

    found = {OWN_GRID: lambda budget: bake("euler", grid_of(budget), range(budget))}
    for name, method in METHODS.items():
        if name in STRATEGIES:
            found[name] = calibrated(name)
        elif not method.uses_spans:
            found[name] = even(name)
    return {**found, **({FITTED: calibrated(FITTED)} if field else {})}


def baked(
    trajectories: Trajectories,
    grid_of: Callable[[int], SigmaGrid],
    field: VelocityField | None,
    methods: Sequence[str],
    budgets: Sequence[int],
) -> list[Competitor]:
    """Methods at budgets, from recordings; "all" means every method.

    Raises `InputError` for a method that there is not, `CalibrationError` for a budget.
    """
    check_budgets(budgets, trajectories.grid.steps)
    known = makers(trajectories, grid_of, field)
    wanted = list(known) if list(methods) == ["all"] else list(dict.fromkeys(methods))
    for method in wanted:
        if method not in known:
            raise InputError(_unknown(method, list(known)))
    recordings = digest_of(encode_json([trajectories.settings, trajectories.samples]))
    return [
        Competitor(
            method,
            budget,
            lambda make=known[method], budget=budget: make(budget),  # type: ignore[misc]
            origin=f"{method} {budget} {recordings}" if method in (*STRATEGIES, FITTED) else None,
        )
        for method in wanted
        for budget in sorted(set(budgets))
    ]


def _unknown(method: str, known: Sequence[str]) -> str:
    if method == FITTED:
        return (
            "fitted schedules run the network while they are made, found a diffusers pipeline; "
            "build a bundle of it and evaluate that, or leave the method out"
        )
    return f"unknown method {method!r}; expected all, or some of {', '.join(known)}"


def of_bundle(bundle: Bundle, names: Sequence[str], size: PictureSize) -> list[Competitor]:
    """Schedules by name or file; without names all that are calibrated for a size.

    A row is called after its schedule's method, or after the schedule where several share method
    and budget. Raises `BundleError` where there is nothing to measure.
    """
    if names:
        schedules = [_named(bundle, name) for name in names]
    else:
        there = [bundle.schedule(name) for name in bundle.schedule_names()]
        schedules = [found for found in there if calibrated_size(found) == size]
    if not schedules:
        raise BundleError(
            f"{bundle.directory} has no schedule that is calibrated for {size}; make one with "
            "`meancache-trt bake`, name some with --schedules, or compare --methods"
        )
    return of_schedules(schedules)


def of_schedules(schedules: Sequence[Schedule]) -> list[Competitor]:
    """Schedules as they are. Raises `InputError` where two have one name and budget."""
    places = [(found.method, found.budget) for found in schedules]
    made = [
        Competitor(
            found.name if places.count(place) > 1 else found.method,
            found.budget,
            lambda found=found: found,  # type: ignore[misc]
        )
        for found, place in zip(schedules, places, strict=True)
    ]
    rows = [(each.method, each.budget) for each in made]
    for row in rows:
        if rows.count(row) > 1:
            raise InputError(
                f"expected each schedule once, found several {row[0]!r} of {row[1]} evaluations; "
                "give one of them another name"
            )
    return made


def steps_of(schedules: Sequence[Schedule]) -> int:
    """The T that all schedules skip steps of. Raises `InputError` where they differ."""
    found = sorted({schedule.grid.steps for schedule in schedules})
    if len(found) > 1:
        raise InputError(
            f"expected schedules of one grid, found grids of {' and '.join(map(str, found))} "
            "steps; evaluate those of each by themselves"
        )
    return found[0]


def _named(bundle: Bundle, name: str) -> Schedule:
    return load_schedule(name) if Path(name).suffix == ".json" else bundle.schedule(name)


@dataclass(frozen=True)
class ScheduleStore:
    """Schedules on disk by what they follow from, so that a run that goes on bakes none again."""

    directory: Path

    def schedule(self, competitor: Competitor) -> Schedule:
        """The competitor's schedule; made where it is not there."""
        if competitor.origin is None:
            return competitor.make()
        origin = digest_of(f"{__version__} {competitor.origin}".encode())[:8]
        path = self.directory / f"{row_key(competitor.method, competitor.budget)}.{origin}.json"
        if path.exists():
            return load_schedule(path)
        schedule = competitor.make()
        self.directory.mkdir(parents=True, exist_ok=True)
        save_schedule(schedule, path)
        return schedule
