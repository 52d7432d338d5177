"""Reading job files: what is taken, what is refused and in which words."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meancache_trt.cli.render import read_prompts
from meancache_trt.errors import InputError
from meancache_trt.production.job_files import Line, read_jobs
from meancache_trt.production.jobs import Job, Limits, size_of

SMALL = Limits(line_bytes=200, prompt_characters=20, jobs=5, file_bytes=2000)


def read(directory: Path, content: bytes | str, suffix: str = ".jsonl") -> list[Line]:
    path = directory / f"jobs{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_jobs(path, SMALL)


def jobs(lines: list[Line]) -> list[Job]:
    assert [line.fault for line in lines if line.job is None] == []
    return [line.job for line in lines if line.job is not None]


def test_a_json_line_has_every_field_of_a_job(tmp_path):
    (job,) = jobs(
        read(
            tmp_path,
            '{"id": "a-1", "prompt": " a cat", "negative_prompt": "", "seed": 18446744073709551615,'
            '"resolution": "64x32x9", "frames": 9, "guidance_scale": 4, "schedule": "b10"}',
        )
    )
    assert job == Job(
        id="a-1",
        prompt=" a cat",
        negative_prompt="",
        seed=2**64 - 1,
        resolution="64x32x9",
        frames=9,
        guidance_scale=4.0,
        schedule="b10",
    )
    assert type(job.guidance_scale) is float


def test_a_target_stands_in_for_a_schedule(tmp_path):
    (job,) = jobs(read(tmp_path, '{"prompt": "a", "target_psnr": 35, "percentile": 5}'))
    assert job == Job(id="0001", prompt="a", target_psnr=35.0, percentile=5.0)


def test_null_is_what_was_left_out(tmp_path):
    assert jobs(read(tmp_path, '{"id": null, "prompt": "a", "seed": null}')) == [
        Job(id="0001", prompt="a")
    ]


def test_frames_may_stand_in_the_resolution_or_beside_it():
    assert size_of("64x32x9", None) == size_of("64x32", 9) == size_of("64x32x9", 9) == (32, 64, 9)
    assert size_of("64x32", None) == (32, 64, None)
    assert size_of(None, 9) == (None, None, 9)


def test_digits_alone_are_a_budget(tmp_path):
    text = '{"prompt": "a", "schedule": "010"}\n{"prompt": "a", "schedule": 10}\n'
    assert [job.schedule for job in jobs(read(tmp_path, text))] == [10, 10]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_are_counted_but_are_no_jobs(tmp_path, end):
    lines = read(tmp_path, end.join(["", '{"prompt": "a"}', "  ", '{"prompt": "b"}', ""]))
    assert [(line.number, line.job and line.job.id) for line in lines] == [(2, "0002"), (4, "0004")]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", '{"prompt": "é"}'),
        (".NDJSON", '{"prompt": "é"}'),
        (".csv", "prompt\né"),
        ("", "é"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, suffix, content):
    (job,) = jobs(read(tmp_path, b"\xef\xbb\xbf" + content.encode(), suffix))
    assert job.prompt == "é"


FAULTS = {
    "truncated": ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at character 14"),
    "not json": ("a cat", "not JSON: Expecting value at character 0"),
    "trailing": ('{"prompt": "a"} {}', "not JSON: Extra data at character 16"),
    "list": ("[1]", 'expected an object such as {"prompt": "a red circle"}, found a list'),
    "number": ("12", 'a red circle"}, found 12'),
    "unknown": ('{"promt": "a"}', "unknown field 'promt'; did you mean prompt?"),
    "case": ('{"Prompt": "a"}', "unknown field 'Prompt'; did you mean prompt?"),
    "stranger": ('{"xyz": 1}', "unknown field 'xyz'; a job has id, prompt, negative_prompt,"),
    "long name": ('{"%s": 1}' % ("y" * 99), "unknown field 'yyyyyyyyyyyyyyyyyyyyyyyyyyyyy"),
    "no prompt": ('{"seed": 1}', "prompt is missing"),
    "twice": ('{"prompt": "a", "prompt": "a"}', "'prompt' is given twice"),
    "twice deeper": ('{"prompt": {"a": 1, "a": 2}}', "'a' is given twice"),
    "number as text": ('{"prompt": "a", "seed": "3"}', "seed is a whole number, found '3'"),
    "float": ('{"prompt": "a", "seed": 3.0}', "seed is a whole number, found 3.0"),
    "bool": ('{"prompt": "a", "frames": true}', "frames is a whole number, found true"),
    "list as text": ('{"prompt": ["a"]}', "prompt is text, found a list"),
    "numeric id": ('{"id": 7, "prompt": "a"}', "id is text, found 7"),
    "object": ('{"prompt": "a", "schedule": {}}', "number of evaluations, found an object"),
    "negative seed": ('{"prompt": "a", "seed": -1}', "(64 bits), found -1"),
    "large seed": ('{"prompt": "a", "seed": 18446744073709551616}', "found 18446744073709551616"),
    "huge": ('{"prompt": "a", "seed": %s}' % ("9" * 99), "a number of 99 digits"),
    "nan": ('{"prompt": "a", "guidance_scale": NaN}', "NaN is no number that JSON has"),
    "inf": ('{"prompt": "a", "guidance_scale": -Infinity}', "-Infinity is no number"),
    "overflow": ('{"prompt": "a", "target_psnr": 1e999}', "number of ordinary size, found inf"),
    "scale": ('{"prompt": "a", "guidance_scale": -1}', "a guidance scale is 0 to 1000, found -1"),
    "both": ('{"prompt": "a", "schedule": 6, "target_psnr": 30}', "leave one of them out"),
    "no target": ('{"prompt": "a", "percentile": 5}', "give target_psnr too"),
    "percentile": ('{"prompt": "a", "target_psnr": 30, "percentile": 1}', "percentile is 5, the"),
    "target": ('{"prompt": "a", "target_psnr": 0}', "above 0 and up to 100 dB, found 0"),
    "budget": ('{"prompt": "a", "schedule": 0}', "a budget is 1 or more evaluations, found 0"),
    "path": ('{"prompt": "a", "schedule": "x/b10"}', "never a file; found 'x/b10'"),
    "windows path": ('{"prompt": "a", "schedule": "x\\\\b10"}', "never a file"),
    "file": ('{"prompt": "a", "schedule": "b10.JSON"}', "never a file; found 'b10.JSON'"),
    "no name": ('{"prompt": "a", "schedule": ""}', "never a file; found ''"),
    "empty": ('{"prompt": ""}', "prompt is empty; write what the picture shows"),
    "blank": ('{"prompt": " \\n"}', "prompt is empty"),
    "too long": ('{"prompt": "%s"}' % ("a" * 21), "prompt has 21 characters, the limit is 20"),
    "too long too": (
        '{"prompt": "a", "negative_prompt": "%s"}' % ("a" * 21),
        "negative_prompt has",
    ),
    "nul": ('{"prompt": "a\\u0000"}', "prompt has a NUL character at 1"),
    "surrogate": ('{"prompt": "a\\udc00"}', "half a surrogate pair at character 1"),
    "size": ('{"prompt": "a", "resolution": "64"}', "a resolution is WIDTHxHEIGHT"),
    "no size": ('{"prompt": "a", "resolution": "64x0"}', "each 1 or more; found '64x0'"),
    "frames": ('{"prompt": "a", "frames": 0}', "frames is 1 or more, found 0"),
    "two frames": (
        '{"prompt": "a", "resolution": "8x8x5", "frames": 9}',
        "resolution '8x8x5' and frames 9 contradict each other",
    ),
    "not utf-8": (b'{"prompt": "\xff"}', "not UTF-8 text: invalid start byte at byte 12"),
    "deep": ("[" * 199, "not JSON"),
    "long line": ('{"prompt": "%s"}' % ("a" * 200), "longer than 200 bytes, the limit of a job"),
}


@pytest.mark.parametrize(("line", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_a_bad_line_is_named_with_its_reason_and_the_others_are_read(tmp_path, line, reason):
    content = line if isinstance(line, bytes) else line.encode()
    before, bad, after = read(tmp_path, b'{"prompt": "a"}\n%b\n{"prompt": "b"}' % content)
    assert before.job == Job(id="0001", prompt="a")
    assert after.job == Job(id="0003", prompt="b")
    assert bad.job is None
    assert str(bad).startswith("line 2: ")
    assert reason in bad.fault
    assert bad.fault.isprintable()
    assert len(bad.fault) < 300


def test_values_within_values_are_a_fault_however_deep(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": ' + "[" * 500_000 + "\n" + '{"a":' * 100_000)
    first, second = read_jobs(path)
    assert first.fault == second.fault == "not a job: values within values, hundreds deep"


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "/abs", "a/b", "a\\b", "..", ".", ".hidden", "-o", "_", "a.", ""),
        *("a b", "a\nb", "a\0", "a:b", "\u202e", "é", "x" * 129, "a\n"),
        *("CON", "nul.png", "Com1", "lpt9.tar.gz"),
    ],
)
def test_an_id_that_is_no_plain_file_name_is_refused(tmp_path, name):
    (line,) = read(tmp_path, json.dumps({"id": name, "prompt": "a"})[:190])
    assert line.job is None


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 128, "console", "a..b", "com10"])
def test_plain_names_are_ids(tmp_path, name):
    (job,) = jobs(read(tmp_path, json.dumps({"id": name, "prompt": "a"})))
    assert job.id == name


def test_an_id_is_taken_once_whatever_its_case(tmp_path):
    lines = ['{"id": "Cat", "prompt": "a"}', '{"prompt": "b"}', '{"id": "cAT", "prompt": "a"}']
    *_, third, fourth = read(tmp_path, "\n".join([*lines, '{"id": "0002", "prompt": "a"}']))
    assert third.fault == "the id 'cAT' is that of line 1, upper and lower case alike"
    assert fourth.fault == "the id '0002' is that of line 2, upper and lower case alike"


def test_an_id_of_a_bad_line_is_free(tmp_path):
    text = '{"id": "a", "prompt": ""}\n{"id": "a", "prompt": "x"}'
    bad, good = read(tmp_path, text)
    assert bad.job is None
    assert good.job == Job(id="a", prompt="x")


def test_lines_are_read_up_to_their_limit_and_no_further(tmp_path):
    exact = '{"prompt": "a"}'.ljust(200)
    lines = read(tmp_path, f"{exact}\n{exact} \n{'x' * 1000}\n{exact}")
    assert [line.number for line in lines] == [1, 2, 3, 4]
    assert [line.job is None for line in lines] == [False, True, True, False]


def test_a_line_that_is_too_long_is_never_held(tmp_path):
    path = tmp_path / "jobs.jsonl"
    with path.open("wb") as file:
        file.truncate(64 << 20)  # a single line of NUL bytes
    tracemalloc.start()
    try:
        (line,) = read_jobs(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert line.fault == "longer than 1,048,576 bytes, the limit of a job"
    assert peak_bytes < 4 << 20  # a piece of a line, and its buffer


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "found none; write some"),
        ("\n \n", "found none; write some"),
        ('{"prompt": "a"}\n' * 6, "more than 5 jobs; split the file"),
        ("\n" * 2001, "more than 2,000 bytes; split the file"),
    ],
)
def test_a_file_without_jobs_or_with_too_many_is_refused(tmp_path, content, reason):
    with pytest.raises(InputError, match=reason):
        read(tmp_path, content)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_files_of_every_kind_have_the_same_limits(tmp_path, suffix):
    with pytest.raises(InputError, match="more than 5 jobs"):
        read(tmp_path, "prompt\n" * 7, suffix)
    with pytest.raises(InputError, match="more than 2,000 bytes"):
        read(tmp_path, "prompt\na\n" + "\n" * 1992, suffix)


def test_a_file_that_cannot_be_read_or_known_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"named .jsonl, .ndjson, .csv or .txt, found .*jobs.json"):
        read(tmp_path, "{}", ".json")
    with pytest.raises(InputError, match="found nothing; check the path"):
        read_jobs(tmp_path / "none.jsonl")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*folder\.csv: Is a directory"):
        read_jobs(tmp_path / "folder.csv")


def test_a_row_has_the_fields_that_the_first_row_names(tmp_path):
    text = (
        "seed, prompt ,id,schedule,guidance_scale\r\n"
        '3,"a, ""b""\r\nc",x,b10,3.5\r\n'
        "\r\n"
        ",,,,\r\n"
        " 4 ,d,,6,1e1\r\n"
    )
    lines = read(tmp_path, text, ".csv")
    assert [line.number for line in lines] == [2, 6]
    assert jobs(lines) == [
        Job(id="x", prompt='a, "b"\r\nc', seed=3, schedule="b10", guidance_scale=3.5),
        Job(id="0006", prompt="d", seed=4, schedule=6, guidance_scale=10.0),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a", "expected 3 cells, as the first row has, found 1; quote a prompt that has commas"),
        ("a,1,x,y", "found 4"),
        ("a,nan,x", "seed is a whole number, found 'nan'"),
        ("a,1.5,x", "seed is a whole number, found 1.5"),
        ("a,٣,x", "seed is a whole number, found '٣'"),
        ("a,1_0,x", "seed is a whole number, found '1_0'"),
        ("a," + "9" * 99 + ",x", "seed is a whole number"),
        ('"a"b,1,x', """not CSV: ',' expected after '"'"""),
        (",1,x", "prompt is missing"),
        ("a\0,1,x", "prompt has a NUL character"),
        ("a,1,b10.json", "never a file"),
        (b"a,1,\xff", "not UTF-8 text"),
        ('"' + ("a" * 99 + "\n") * 3 + '"', "longer than 200 bytes"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(tmp_path, row, reason):
    content = row if isinstance(row, bytes) else row.encode()
    lines = read(tmp_path, b"prompt,seed,schedule\nfine,1,6\n" + content, ".csv")
    assert lines[0].job == Job(id="0002", prompt="fine", seed=1, schedule=6)
    assert lines[1].number == 3
    assert reason in lines[1].fault


def test_rows_after_a_quote_that_never_ends_are_lost_but_not_silently(tmp_path):
    good, bad = read(tmp_path, 'prompt\na\n"b\nc\n', ".csv")
    assert good.job == Job(id="0002", prompt="a")
    assert str(bad) == "line 3: not CSV: unexpected end of data"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("id,promt", "line 1 has to name the fields; unknown field 'promt'; did you mean prompt"),
        ("id,seed", "expected one named prompt, found id, seed"),
        ("prompt,id,prompt", "two columns are named prompt"),
        ("prompt,", "unknown field ''"),
        ("a red circle", "unknown field 'a red circle'"),
        ('"prompt', "has to name the fields; not CSV"),
    ],
)
def test_a_table_whose_first_row_names_no_fields_is_refused(tmp_path, header, reason):
    with pytest.raises(InputError, match=reason):
        read(tmp_path, f"{header}\nx,y\n", ".csv")


PROMPT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
).filter(lambda text: text.strip())
FIELDS = st.fixed_dictionaries(
    {"prompt": PROMPT},
    optional={
        "negative_prompt": PROMPT,
        "seed": st.integers(0, 2**64 - 1),
        "frames": st.integers(1, 999),
        "guidance_scale": st.floats(0, 1000),
        "schedule": st.sampled_from(["b10", 6, "full"]),
    },
)


@given(st.lists(FIELDS, min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_table_and_lines_of_json_give_the_same_jobs(tmp_path, fields: list[dict[str, Any]]):
    for index, each in enumerate(fields):
        each["id"] = f"job-{index}"
    names = [name for name in Job.__struct_fields__ if any(name in each for each in fields)]
    lines = "\n".join(json.dumps(each) for each in fields)
    with (tmp_path / "jobs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(fields)
    (tmp_path / "jobs.jsonl").write_text(lines)
    found = [jobs(read_jobs(tmp_path / name)) for name in ("jobs.csv", "jobs.jsonl")]
    assert found[0] == found[1]
    assert [
        {f: v for f in Job.__struct_fields__ if (v := getattr(job, f)) is not None}
        for job in found[0]
    ] == fields


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_text_file_has_the_prompts_that_render_reads(tmp_path, text):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"first{text}\nlast".encode())
    lines = read_jobs(path)
    prompts = read_prompts(path)
    assert [line.job.prompt if line.job else None for line in lines] == [
        None if "\0" in prompt else prompt for prompt in prompts
    ]
    ids = [f"{index:04d}" for index in range(len(prompts))]
    assert [line.job.id for line in lines if line.job] == [
        name for name, prompt in zip(ids, prompts, strict=True) if "\0" not in prompt
    ]


def test_prompts_are_counted_from_0_and_lines_from_1(tmp_path):
    lines = read(tmp_path, b"\n a cat \r\n\r\n\xff\nlong prompts are faults\n a dog", ".txt")
    assert [(line.number, line.job and line.job.id) for line in lines] == [
        (2, "0000"),
        (4, None),
        (5, None),
        (6, "0003"),
    ]
    assert [line.job.prompt for line in lines if line.job] == ["a cat", "a dog"]


PIECES = st.sampled_from(
    [
        b'{"prompt": "a"}',
        b"prompt,id",
        b"a,b",
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"\\u",
        b"[",
    ]
)


@given(st.sampled_from([".jsonl", ".csv", ".txt"]), st.lists(PIECES | st.binary(), max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_jobs_or_faults(tmp_path, suffix, pieces):
    try:
        lines = read(tmp_path, b"".join(pieces), suffix)
    except InputError:
        return
    assert [line.number for line in lines] == sorted(line.number for line in lines)
    assert all((line.job is None) == bool(line.fault) for line in lines)
