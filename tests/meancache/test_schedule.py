"""The schedule file: what is written is read back, and what is malformed is refused by name."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meancache_trt.errors import InputError, ScheduleError
from meancache_trt.meancache import files
from meancache_trt.meancache.presets import preset, preset_names
from meancache_trt.meancache.schedule import (
    Evidence,
    ModelReference,
    Schedule,
    bake,
    load_schedule,
    save_schedule,
)
from meancache_trt.meancache.sigmas import make_grid

ROOT = Path(__file__).parents[2]
NODES, SPANS = (0, 1, 3, 7, 14), (1, 2, 3, 4)
GRID = make_grid(20, shift=3.0)

# Files are written for every example into one directory; each example has its own content.
one_directory = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)


def official() -> Schedule:
    return bake("official", GRID, NODES, SPANS)


def calibrated() -> Schedule:
    """An official table with evidence and a guidance scale, so that it is tied to both."""
    return bake(
        "official",
        make_grid(20, mu=0.7, shift_terminal=0.02, height=256, width=512, frames=9),
        NODES,
        SPANS,
        name="b5",
        family="flux",
        model=ModelReference(name="stand-in", digest="sha256:00"),
        guidance_scale=3.5,
        precision="bfloat16",
        calibration=Evidence(samples=8, seconds=1.25, edge_costs=(0.1,) * 5, gamma=3.0),
    )


def fitted() -> Schedule:
    """Weights that no rule gives, as least squares would leave them."""
    weights = tuple(
        tuple(np.random.default_rng(n).normal(size=min(n + 1, 3)).tolist())
        for n in range(len(NODES))
    )
    return Schedule(name="fit", grid=GRID, method="fitted", nodes=NODES, history=3, weights=weights)


SCHEDULES = {"official": official, "calibrated": calibrated, "fitted": fitted}


def as_fields(schedule: Schedule) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(msgspec.json.encode(schedule))
    return fields


def write(path: Path, fields: object) -> Path:
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------ reading back


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_saved_schedule_is_read_back_identical(
    make: Callable[[], Schedule], tmp_path: Path
) -> None:
    schedule = make()
    save_schedule(schedule, tmp_path / "a.json")
    loaded = load_schedule(tmp_path / "a.json")
    assert loaded == schedule
    save_schedule(loaded, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("name", preset_names())
def test_published_schedules_are_read_back_identical(name: str, tmp_path: Path) -> None:
    save_schedule(preset(name), tmp_path / "preset.json")
    assert load_schedule(str(tmp_path / "preset.json")) == preset(name)


def test_table_is_float32_and_padded_to_the_history_asked_for() -> None:
    schedule = official()
    table = schedule.table(8)
    assert table.dtype == np.float32
    assert table.shape == (5, 8)
    for row, weights in zip(table, schedule.weights, strict=True):
        np.testing.assert_array_equal(row[: len(weights)], np.array(weights, np.float32))
        assert not row[len(weights) :].any()


def test_history_is_never_truncated() -> None:
    schedule = official()
    assert schedule.history > 1
    with pytest.raises(ScheduleError, match="never truncated"):
        schedule.table(schedule.history - 1)


def test_sigmas_and_timesteps_are_those_of_the_nodes() -> None:
    schedule = official()
    expected = [GRID.sigmas[node] for node in NODES]
    assert schedule.sigmas().tolist() == [*expected, 0.0]
    assert schedule.timesteps().tolist() == [GRID.timesteps[node] for node in NODES]
    assert schedule.timesteps().dtype == np.float32


# ------------------------------------------------------------------------------ malformed files


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.pop(name)


def replaced(value: object, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        target: Any = fields
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{
        f"no {name}": (without(name), f"missing required field `{name}`")
        for name in ("name", "grid", "method", "nodes", "history", "weights")
    },
    "no schema": (without("schema"), "schedule/1', found None"),
    "another version": (replaced("meancache-trt/schedule/2", "schema"), "schedule/1', found"),
    "schema of another type": (replaced(1, "schema"), "schedule/1', found 1"),
    "no spans": (without("spans"), "needs 4 spans"),
    "unknown field": (replaced(1, "gamma"), "unknown field `gamma`"),
    "unknown field of the grid": (replaced(1, "grid", "karras"), "unknown field `karras`"),
    "unknown method": (replaced("telepathy", "method"), "unknown method 'telepathy'"),
    "name of another type": (replaced(7, "name"), "Expected `str`, got `int`"),
    "nodes of another type": (replaced("0,1", "nodes"), "Expected `array`, got `str`"),
    "fractional node": (replaced(1.5, "nodes", 1), "Expected `int`, got `float`"),
    "grid of another type": (replaced(None, "grid"), "Expected `object`, got `null`"),
    "too few rows": (lambda fields: fields["weights"].pop(), "5 nodes need 5 rows .*found 4"),
    "too many rows": (lambda fields: fields["weights"].append([0.0]), "5 rows .*found 6"),
    "empty row": (replaced([], "weights", 2), "row 2 holds 1 to 3 weights .*found 0"),
    "row before its history": (replaced([0.0, 1.0], "weights", 0), "row 0 holds 1 to 1"),
    "unsorted nodes": (replaced([0, 3, 1, 7, 14], "nodes"), "found 1 after 3"),
    "repeated node": (replaced([0, 1, 1, 7, 14], "nodes"), "found 1 after 1"),
    "no node 0": (replaced([1, 2, 3, 7, 14], "nodes"), "add node 0"),
    "no node": (replaced([], "nodes"), "the list is empty"),
    "node beyond the grid": (replaced(20, "nodes", 4), "0 to 19, found 20"),
    "span longer than the history": (replaced([1, 3, 3, 4], "spans"), "1 to 2 .*found 3"),
    "too few spans": (replaced([1, 2, 3], "spans"), "need 4 spans, found 3"),
    "weight that is null": (replaced(None, "weights", 0, 0), "Expected `float`, got `null`"),
    "weight beyond float32": (replaced(1e39, "weights", 0, 0), "not a finite float32"),
    "tampered weight": (replaced(-0.5, "weights", 0, 0), "not those of method 'official'"),
    "tampered span": (replaced([1, 2, 4, 4], "spans"), "not those of method 'official'"),
    "tampered sigma": (replaced(0.9, "grid", "sigmas", 4), "not those of method|must descend"),
    "tampered method": (replaced("paper", "method"), "not those of method 'paper'"),
    "spans for a method without": (replaced("euler", "method"), "takes no spans"),
    "wrong history": (replaced(9, "history"), "longest row"),
    "sigmas that rise": (replaced(0.999, "grid", "sigmas", 8), "must descend"),
    "sigma above 1": (replaced(1000.0, "grid", "sigmas", 0), "not timesteps"),
    "missing sigma": (lambda fields: fields["grid"]["sigmas"].pop(), "has 21 sigmas"),
    "missing timestep": (lambda fields: fields["grid"]["timesteps"].pop(), "has 20 timesteps"),
    "another number of steps": (replaced(19, "grid", "steps"), "19 steps has 20 sigmas"),
    "unknown convention": (replaced("karras", "grid", "convention"), "Invalid enum value"),
}


@pytest.mark.parametrize(("change", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_file_is_refused_by_name(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    fields = as_fields(official())
    change(fields)
    path = write(tmp_path / "bad.json", fields)
    with pytest.raises(ScheduleError, match=message) as caught:
        load_schedule(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b"not json",
        b"\xff\xfe{}",
        b'{"schema": "\xff"}',
        b"[" * 10**5,
    ],
)
def test_text_that_is_no_schedule_is_refused_by_name(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    with pytest.raises(ScheduleError) as caught:
        load_schedule(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_weight_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    # Python's own writer puts the word NaN, which is not JSON.
    fields = as_fields(official())
    fields["weights"][1][0] = float("nan")
    with pytest.raises(ScheduleError, match="not JSON"):
        load_schedule(write(tmp_path / "nan.json", fields))
    with pytest.raises(ScheduleError, match="row 0 has a weight that is not a finite float32"):
        msgspec.structs.replace(official(), weights=((float("nan"),), *official().weights[1:]))


@one_directory
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_by_name(cut: float, tmp_path: Path) -> None:
    text = files.encode_json(official()).rstrip()
    path = tmp_path / "cut.json"
    path.write_bytes(text[: int(cut * len(text))])
    with pytest.raises(ScheduleError) as caught:
        load_schedule(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError) as caught:
            load_schedule(path)
        assert str(path) in str(caught.value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    keys = (
        value.keys()
        if isinstance(value, dict)
        else range(len(value) if isinstance(value, list) else 0)
    )
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


FIELDS = as_fields(calibrated())
PLACES = [place for place in places(FIELDS) if place]


@one_directory
@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_replaced_value_is_refused_by_name_or_still_a_schedule(
    place: tuple[str | int, ...], value: object, tmp_path: Path
) -> None:
    fields = copy.deepcopy(FIELDS)
    replaced(value, *place)(fields)
    path = write(tmp_path / "changed.json", fields)
    try:
        schedule = load_schedule(path)
    except ScheduleError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017 - acceptance is allowed too
    else:
        assert np.isfinite(schedule.table(schedule.history)).all()
        assert schedule.nodes[0] == 0


@one_directory
@given(data=st.data())
def test_any_flipped_byte_is_refused_by_name_or_still_a_schedule(
    data: st.DataObject, tmp_path: Path
) -> None:
    text = bytearray(files.encode_json(calibrated()))
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.json"
    path.write_bytes(text)
    try:
        load_schedule(path)
    except ScheduleError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017 - acceptance is allowed too


# ------------------------------------------------------------------------------ another grid


def test_an_analytic_schedule_is_refolded_for_another_grid() -> None:
    other = make_grid(20, shift=5.0)
    fitted_to = official().fit_to(other, 7.0)
    assert fitted_to == bake("official", other, NODES, SPANS)
    assert fitted_to.weights != official().weights


def test_refolding_keeps_what_the_schedule_is_tied_to() -> None:
    tied = msgspec.structs.replace(calibrated(), calibration=None)
    fields = ("name", "family", "model", "guidance_scale", "precision", "nodes", "spans", "method")
    refolded = tied.fit_to(GRID, 3.5)
    assert refolded.grid == GRID
    assert [getattr(refolded, name) for name in fields] == [getattr(tied, name) for name in fields]


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_fits_is_returned_as_it_is(make: Callable[[], Schedule]) -> None:
    schedule = make()
    assert schedule.fit_to(schedule.grid, 3.5) is schedule


@pytest.mark.parametrize("make", [calibrated, fitted])
@pytest.mark.parametrize(
    ("grid", "difference"),
    [
        (make_grid(20, shift=5.0), "sigma .* against .* at step"),
        (make_grid(21, shift=3.0), "20 steps against 21"),
    ],
)
def test_a_calibrated_schedule_refuses_another_grid(
    make: Callable[[], Schedule], grid: Any, difference: str
) -> None:
    with pytest.raises(ScheduleError, match=f"another grid: {difference}"):
        make().fit_to(grid, 3.5)


def test_a_calibrated_schedule_refuses_another_number_of_frames() -> None:
    longer = msgspec.structs.replace(calibrated().grid, frames=17)
    with pytest.raises(ScheduleError, match="9 frames against 17"):
        calibrated().fit_to(longer, 3.5)


@pytest.mark.parametrize("scale", [6.0, None])
def test_a_schedule_refuses_another_guidance_scale(scale: float | None) -> None:
    with pytest.raises(ScheduleError, match=rf"guidance scale 3\.5, found {scale}"):
        calibrated().fit_to(calibrated().grid, scale)


def test_refolding_onto_a_grid_that_is_too_short_is_refused() -> None:
    with pytest.raises(ScheduleError, match="0 to 9, found 14"):
        official().fit_to(make_grid(10), None)


# ------------------------------------------------------------------------------ JSON Schema


def published_schema() -> dict[str, Any]:
    text = (ROOT / "meancache" / "schedule.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def test_schema_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("schema", ROOT / "scripts" / "write_schema.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "meancache" / "schedule.schema.json").read_text("utf-8") == script.schema_text()


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_saved_schedules_validate_against_the_schema(
    make: Callable[[], Schedule], tmp_path: Path
) -> None:
    save_schedule(make(), tmp_path / "a.json")
    jsonschema.Draft202012Validator.check_schema(published_schema())
    jsonschema.validate(json.loads((tmp_path / "a.json").read_text()), published_schema())


@pytest.mark.parametrize("case", ["no name", "no schema", "unknown field", "another version"])
def test_schema_refuses_what_its_words_can_say(case: str) -> None:
    fields = as_fields(official())
    MALFORMED[case][0](fields)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(fields, published_schema())


# -------------------------------------------------------------------- ranges of guidance scales


def test_a_schedule_for_a_range_serves_every_scale_in_it() -> None:
    ranged = msgspec.structs.replace(fitted(), guidance_range=(2.0, 6.0))
    for scale in (2.0, 3.5, 6.0):
        assert ranged.fit_to(GRID, scale) == ranged
    for scale in (1.9, 6.1, None):
        with pytest.raises(ScheduleError, match=rf"scales 2 to 6, found {scale}; render with one"):
            ranged.fit_to(GRID, scale)
    assert ranged.on_grid(GRID) == ranged


def test_a_range_of_impossible_scales_is_refused() -> None:
    with pytest.raises(InputError, match="0 to 1000, found 2000"):
        msgspec.structs.replace(fitted(), guidance_range=(2.0, 2000.0))


@pytest.mark.parametrize(
    ("made", "run", "is_taken"),
    [
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("float16", "bfloat16", True),
        ("float8", "float8", True),
        ("float32", "float8", False),
        ("int8", "bfloat16", False),
    ],
)
def test_what_was_calibrated_serves_networks_of_a_near_precision(
    made: str, run: str, is_taken: bool
) -> None:
    schedule = msgspec.structs.replace(calibrated(), precision=made)
    refusal = pytest.raises(ScheduleError, match=f"calibrated in {made}, this network is {run};")
    with contextlib.nullcontext() if is_taken else refusal:
        schedule.check_precision(run)


def test_what_was_not_calibrated_serves_networks_of_any_precision() -> None:
    msgspec.structs.replace(official(), precision="float8").check_precision("int4")
