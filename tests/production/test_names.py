"""Names of files: what a template gives, and what no job can make of it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meancache_trt.errors import InputError
from meancache_trt.production.names import NameTemplate, check_unique, slug
from tests.production.tickets import make_ticket


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{id}", "fox-1"),
        ("{index:06d}-{slug}", "000007-a-red-fox"),
        ("{schedule}/{id}-{seed}", "b3/fox-1-5"),
        ("{width}x{height}/{index}_{id:.3}", "64x48/7_fox"),
        ("für {id}, (nr. {index:03})", "für fox-1, (nr. 007)"),
        ("{index:d}", "7"),
    ],
)
def test_a_template_is_filled_from_the_job(template, name):
    ticket = make_ticket("fox-1", prompt="A red  fox!", index=7)
    assert NameTemplate.parse(template).fill(ticket) == name


@pytest.mark.parametrize(
    "template",
    [
        "",
        "/{id}",
        "{id}/",
        "a//{id}",
        "../{id}",
        "a/../{id}",
        "./{id}",
        ".{id}",
        ".meancache/{id}",
        "a/.b/{id}",
        "{id}.",
        "{id} ",
        " a/{id}",
        "results.jsonl/{id}",
        "Results.JSONL/{id}",
        "a" * 300,
        "/".join(["a" * 200] * 6),
    ],
)
def test_a_template_that_would_leave_or_hide_is_refused(template):
    with pytest.raises(InputError, match=r"a file's name|a part of a file's name|the run's own"):
        NameTemplate.parse(template)


@pytest.mark.parametrize("sign", list("\\:*?\"<>|~$`'\0\n\x7f\u202e"))
def test_a_sign_that_some_system_takes_amiss_is_refused(sign):
    with pytest.raises(InputError, match="around its fields"):
        NameTemplate.parse(f"a{sign}{{id}}")


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}",
        "{}",
        "{0}",
        "{id.__class__}",
        "{id[0]}",
        "{id!r}",
        "{id:>10}",
        "{id:.0}",
        "{index:{width}}",
        "{index:999999d}",
        "{index:06x}",
        "{index: 6d}",
        "{index:_}",
        "{seed:+d}",
        "{id",
        "id}",
        "{id!}",
    ],
)
def test_a_field_that_is_none_is_refused(template):
    with pytest.raises(InputError, match=r"name template|expected a field such as"):
        NameTemplate.parse(template)


@pytest.mark.parametrize(
    "job_id", ["", "..", ".", ".hidden", "a/b", "/etc/passwd", "a\\b", "a\0", "ä", "a b", "a" * 244]
)
def test_an_id_that_is_no_name_is_refused(job_id):
    with pytest.raises(InputError, match="name"):
        NameTemplate.parse("{id}").fill(make_ticket(job_id))


def test_the_longest_name_can_be_written_with_any_suffix(tmp_path: Path):
    name = NameTemplate.parse("{id}").fill(make_ticket("a" * 243))
    (tmp_path / f"{name}.safetensors").touch()
    assert [path.stem for path in tmp_path.iterdir()] == ["a" * 243]


def test_a_schedules_name_is_made_safe():
    ticket = make_ticket(schedule="../mine & yours")
    assert NameTemplate.parse("x{schedule}").fill(ticket) == "x..-mine-yours"
    with pytest.raises(InputError, match="hidden"):
        NameTemplate.parse("{schedule}").fill(ticket)


FIELDS = ["id", "index", "slug", "seed", "schedule", "width", "height", "other", "id.x", "id[0]"]
PIECES = st.one_of(
    st.sampled_from([f"{{{name}}}" for name in FIELDS]),
    st.sampled_from(["/", "..", ".", "\\", "a", "-", " ", "{{", "}", "{index:03d}", "{id:.2}"]),
    st.text(max_size=3),
)
VALUES = st.one_of(
    st.sampled_from(["..", "../..", "/", "a", "b.c", ".", "a/../../b", "results.jsonl", "~"]),
    st.text(max_size=6),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True),
)


@settings(deadline=None)
@given(
    template=st.lists(PIECES, max_size=6).map("".join),
    job_id=VALUES,
    prompt=VALUES,
    schedule=VALUES,
    index=st.integers(0, 10**6),
    seed=st.integers(-(2**63), 2**64),
)
def test_no_job_decides_where_its_files_go(template, job_id, prompt, schedule, index, seed):
    ticket = make_ticket(job_id, prompt=prompt, index=index, seed=seed, schedule=schedule)
    try:
        name = NameTemplate.parse(template).fill(ticket)
    except InputError:
        return
    parts = name.split("/")
    assert len(parts) == template.count("/") + 1
    assert PurePosixPath("out", name).parts == ("out", *parts)
    assert not any(part.startswith(".") or "\\" in part or "\0" in part for part in parts)
    assert name.isprintable()
    assert all(len(f"{part}.safetensors".encode()) <= 255 for part in parts)
    assert not {"results.jsonl"} & {part.lower() for part in parts}


def test_a_plain_id_is_always_a_name():
    for job_id in ("a", "A-1_b.c", "0" * 128):
        assert NameTemplate.parse("{id}").fill(make_ticket(job_id)) == job_id


@pytest.mark.parametrize(
    ("first", "second"), [("a/b", "a/b"), ("fox", "FOX"), ("straße", "STRASSE"), ("é", "e\u0301")]
)
def test_names_that_a_file_system_may_take_for_one_are_refused(first, second):
    with pytest.raises(InputError, match="jobs 'one' and 'three' would both be written"):
        check_unique([("one", first), ("two", "other"), ("three", second)])


def test_names_that_differ_are_taken():
    check_unique((str(index), f"{index:04d}") for index in range(1000))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A Red fox, asleep!", "a-red-fox-asleep"),
        ("狐", "picture"),
        ("", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 47 + " yz", "x" * 47),
    ],
)
def test_a_slug_is_the_prompts_words(prompt, expected):
    assert slug(prompt) == expected
