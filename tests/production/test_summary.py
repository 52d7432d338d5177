from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from meancache_trt.errors import InputError
from meancache_trt.production.results import Result
from meancache_trt.production.summary import Summary, summarize
from tests.production.made import FULL, make_result, make_ticket


def written(path: Path, *results: Result) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(result) + b"\n" for result in results))
    return path


def test_nothing_is_the_sum_of_no_log(tmp_path):
    assert summarize(tmp_path / "results.jsonl") == Summary(0, {}, {}, {}, None, None)


def test_a_job_that_was_done_after_it_failed_is_done(tmp_path):
    tickets = [make_ticket(index) for index in range(3)]
    log = written(
        tmp_path / "results.jsonl",
        make_result(tickets[0], "failed", "first"),
        make_result(tickets[1], "failed", "one"),
        make_result(tickets[0]),
        make_result(tickets[1], "failed", "another"),
        make_result(make_ticket(2, schedule=FULL)),
    )
    found = summarize(log)
    assert (found.done, found.failed) == (2, 1)
    assert found.failures == {"job1": "another"}
    assert found.schedules == {"b5": 1, "full": 1}


def test_jobs_of_other_lists_do_not_count(tmp_path):
    tickets = [make_ticket(index) for index in range(3)]
    failed = make_result(tickets[2], "failed", "why")
    log = written(tmp_path / "results.jsonl", *map(make_result, tickets[:2]), failed)
    found = summarize(log, {"job1"})
    assert (found.done, found.failed) == (1, 0)


def test_warnings_of_one_kind_count_together(tmp_path):
    warnings = [
        ("57% of the pixels are clipped; ordinary are less than 50%", "plain"),
        ("61% of the pixels are clipped; ordinary are less than 50%",),
    ]
    rows = [
        msgspec.structs.replace(make_result(make_ticket(index)), warnings=said)
        for index, said in enumerate(warnings)
    ]
    assert summarize(written(tmp_path / "results.jsonl", *rows)).warnings == {
        "part of the pixels are clipped; ordinary are less than 50%": 2,
        "plain": 1,
    }


def test_the_piece_of_a_line_is_no_row_and_a_broken_line_is_an_error(tmp_path):
    log = written(tmp_path / "results.jsonl", make_result(make_ticket()))
    log.write_bytes(log.read_bytes() + b'{"id": ')
    assert summarize(log).done == 1
    log.write_bytes(log.read_bytes() + b"\n")
    with pytest.raises(InputError, match=r"line 2 of .* is not a row of this log"):
        summarize(log)
