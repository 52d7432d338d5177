"""The schedule file: what is written is read back, and what is malformed is refused by name."""

from __future__ import annotations

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
from tests.meancache.schedules import SCHEDULES, as_fields, calibrated, official

from meancache_trt.errors import InputError, ScheduleError
from meancache_trt.meancache import files
from meancache_trt.meancache.presets import preset, preset_names
from meancache_trt.meancache.schedule import Schedule, load_schedule, save_schedule

ROOT = Path(__file__).parents[2]

# Files are written for every example into one directory; each example has its own content.
one_directory = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)


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
