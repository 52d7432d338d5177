"""Which schedules are measured: those of a bundle, or every method that can be baked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from meancache_trt import __version__
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import (
    BakeOptions,
    Baker,
    bakeable_methods,
    baking,
    check_budgets,
)
from meancache_trt.calibration.evaluation import row_key
from meancache_trt.calibration.placements import PLACEMENTS
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.errors import BundleError, InputError
from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.methods import METHODS
from meancache_trt.meancache.schedule import FITTED, Schedule, load_schedule, save_schedule
from meancache_trt.selection import calibrated_size
from meancache_trt.shapes import PictureSize

OWN_GRID = "euler-own-grid"
"""Euler on the model's own grid of B steps: what a user does who has no schedule."""


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


def all_methods() -> tuple[str, ...]:
    """What "all" means: the one place that knows what there is to compare."""
    return (OWN_GRID, *bakeable_methods())


def chosen_methods(methods: Sequence[str]) -> dict[str, BakeOptions]:
    """How each of some methods is baked; METHOD-PLACEMENT is one at another placement.

    "all" among them means every one. Raises `InputError` for a method that there is not.
    """
    names = all_methods() if "all" in methods else dict.fromkeys(methods)
    return {name: _options(name) for name in names}


def _options(name: str) -> BakeOptions:
    if name in bakeable_methods():
        return BakeOptions(method=name)
    for placement in PLACEMENTS:
        method = name.removesuffix(f"-{placement}")
        if method != name and method in METHODS:
            return BakeOptions(method=method, placement=placement)
    raise InputError(
        f"unknown method {name!r}; expected all, some of {', '.join(bakeable_methods())}, or one "
        f"of them with a placement ({', '.join(PLACEMENTS)}), such as {OWN_GRID}"
    )


class Bakery:
    """Bakes any method from one recording; a context manager.

    Each method measures what it needs at its first budget and keeps it. `field`, the network that
    was recorded, is run by fitted schedules alone.
    """

    def __init__(self, trajectories: Trajectories, field: Callable[[], VelocityField]) -> None:
        self._trajectories, self._field = trajectories, field
        self._stack = contextlib.ExitStack()
        self._bakers: dict[BakeOptions, Baker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def competitors(self, methods: Sequence[str], budgets: Sequence[int]) -> list[Competitor]:
        """Methods at budgets; see `chosen_methods`.

        Raises `InputError` for a method that there is not, `CalibrationError` for a budget.
        """
        check_budgets(budgets, self._trajectories.grid.steps)
        settings, samples = self._trajectories.settings, self._trajectories.samples
        recordings = digest_of(encode_json([settings, samples]))
        return [
            Competitor(
                name,
                budget,
                functools.partial(self._bake, options, budget),
                origin=f"{options} {budget} {recordings}",
            )
            for name, options in chosen_methods(methods).items()
            for budget in sorted(set(budgets))
        ]

    def _bake(self, options: BakeOptions, budget: int) -> Schedule:
        if options not in self._bakers:
            network = self._field() if options.method == FITTED else None
            made = baking(self._trajectories, options, network)
            self._bakers[options] = self._stack.enter_context(made)
        return self._bakers[options].bake(budget).schedule


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
