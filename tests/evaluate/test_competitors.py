from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import BakeOptions, bakeable_methods
from meancache_trt.calibration.trajectories import Prompt, Settings, Trajectories, record
from meancache_trt.errors import BundleError, CalibrationError, InputError
from meancache_trt.evaluate.competitors import (
    OWN_GRID,
    Bakery,
    Competitor,
    ScheduleStore,
    chosen_methods,
    of_bundle,
    of_schedules,
    steps_of,
)
from meancache_trt.meancache.schedule import FITTED, Schedule, bake, save_schedule
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.shapes import PictureSize
from tests.calibration.conftest import FieldSampler, FormulaField

SIZE = PictureSize(64, 64)


@pytest.fixture
def recorded(tmp_path: Path) -> Trajectories:
    grid = make_grid(12, shift=3.0)
    prompts = [Prompt("a ring", seed) for seed in range(4)]
    return record(tmp_path / "recorded", Settings(grid=grid), FieldSampler(grid), prompts)


def test_all_means_every_method_that_can_be_baked_and_fewer_steps() -> None:
    assert list(chosen_methods(["all"])) == [OWN_GRID, *bakeable_methods()]


def test_a_method_may_be_named_with_a_placement() -> None:
    found = chosen_methods(["ab2-even", "official"])
    assert found == {
        "ab2-even": BakeOptions(method="ab2", placement="even"),
        "official": BakeOptions(method="official"),
    }


@pytest.mark.parametrize("name", ["magic", "ab2-nowhere", "fitted-even", ""])
def test_a_method_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"unknown method '{name}'; expected all.*fitted"):
        chosen_methods([name])


def test_methods_are_baked_at_their_turn_and_budgets_ascend(recorded: Trajectories) -> None:
    asked = []

    def field() -> FormulaField:
        asked.append(1)
        return FormulaField(recorded.grid)

    with Bakery(recorded, field) as bakery:
        found = bakery.competitors(["euler", OWN_GRID, FITTED], [6, 3, 6])
        rows = [(each.method, each.budget) for each in found]
        assert rows == [(m, b) for m in ("euler", OWN_GRID, FITTED) for b in (3, 6)]
        euler, own = found[0].make(), found[2].make()
        assert (euler.method, euler.budget, euler.grid.steps) == ("euler", 3, 12)
        assert (own.method, own.nodes, own.grid.steps) == ("euler", (0, 1, 2), 3)
        assert not asked  # fitted schedules alone run the network
        assert [each.make().budget for each in found[4:]] == [3, 6]
    assert len(asked) == 1


def test_a_budget_outside_the_grid_is_refused(recorded: Trajectories) -> None:
    with (
        Bakery(recorded, lambda: FormulaField(recorded.grid)) as bakery,
        pytest.raises(CalibrationError, match="1 to 12 evaluations on this grid, found 13"),
    ):
        bakery.competitors(["euler"], [13])


def test_what_was_baked_is_not_baked_again(tmp_path: Path) -> None:
    made: list[Schedule] = []

    def make() -> Schedule:
        made.append(bake("euler", make_grid(6), range(3)))
        return made[-1]

    store = ScheduleStore(tmp_path / "schedules")
    competitor = Competitor("euler", 3, make, origin="a recording")
    assert store.schedule(competitor) == store.schedule(competitor) == made[0]
    assert len(made) == 1
    store.schedule(replace(competitor, origin="another recording"))
    assert len(made) == 2


def test_schedules_of_one_method_and_budget_are_told_apart_by_name() -> None:
    schedules = [
        bake("euler", make_grid(6), [0, 1], name="early"),
        bake("euler", make_grid(6), [0, 4], name="late"),
        bake("euler", make_grid(6), [0, 1, 2]),
    ]
    found = [(each.method, each.budget) for each in of_schedules(schedules)]
    assert found == [("early", 2), ("late", 2), ("euler", 3)]


def test_the_same_schedule_twice_is_refused() -> None:
    schedule = bake("euler", make_grid(6), [0, 1], name="early")
    with pytest.raises(InputError, match="found several 'early' of 2"):
        of_schedules([schedule, schedule])


def test_schedules_of_two_grids_have_no_common_reference() -> None:
    with pytest.raises(InputError, match="grids of 6 and 8 steps"):
        steps_of([bake("euler", make_grid(steps), [0]) for steps in (8, 6)])


def test_a_bundles_schedules_are_found_by_name_and_file(
    shared_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(shared_bundle)
    file = tmp_path / "mine.json"
    save_schedule(msgspec.structs.replace(bundle.schedule("b6"), name="mine"), file)
    found = of_bundle(bundle, ["b10", str(file)], SIZE)
    assert [each.make().name for each in found] == ["b10", "mine"]


def test_a_bundle_without_calibrated_schedules_says_what_to_do(shared_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no schedule that is calibrated for 64x64; make one"):
        of_bundle(Bundle.open(shared_bundle), [], SIZE)
