"""The results log: every row once and whole, whoever writes it and however that ends."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meancache_trt.errors import InputError
from meancache_trt.production.claims import locked
from meancache_trt.production.results import Result, ResultsLog
from tests.production.conftest import RunOnDisk
from tests.production.made import FULL, make_result, make_ticket

TICKETS = [make_ticket(index, prompt=f"a lake, № {index}") for index in range(6)]


def rows_in(directory: Path) -> list[Result]:
    lines = (directory / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    return [msgspec.json.decode(line, type=Result) for line in lines]


def test_a_new_log_knows_nothing_and_makes_no_file(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path / "out")
    log.refresh()
    assert log.status_of(TICKETS[0]) is None
    assert log.row("job0") is None
    assert (log.done, log.failed) == (0, 0)
    assert log.append([]) == []
    assert not log.path.exists()


def test_rows_are_read_as_they_were_written_also_by_others(tmp_path: Path) -> None:
    writer, reader = ResultsLog(tmp_path), ResultsLog(tmp_path)
    rows = [make_result(TICKETS[0]), make_result(TICKETS[1], "failed", error="no \n memory")]
    assert writer.append(rows) == rows
    assert reader.status_of(TICKETS[0]) is None
    reader.refresh()
    for log in (writer, reader):
        assert [log.status_of(ticket) for ticket in TICKETS[:3]] == ["done", "failed", None]
        assert [log.row("job0"), log.row("job1")] == rows
        assert (log.done, log.failed) == (1, 1)
    assert rows_in(tmp_path) == rows


def test_the_latest_row_counts_and_a_done_one_is_final(tmp_path: Path) -> None:
    log, other = ResultsLog(tmp_path), ResultsLog(tmp_path)
    failed, done = make_result(TICKETS[0], "failed", error="a"), make_result(TICKETS[0])
    again = make_result(TICKETS[0], "failed", error="b")
    assert log.append([failed]) == [failed]
    assert other.append([again]) == [again]
    log.refresh()
    assert log.row("job0") == again
    assert (log.done, log.failed) == (0, 1)
    assert log.append([done, done, failed]) == [done]
    assert other.append([done, failed]) == []  # which it had not read
    assert other.row("job0") == done
    assert (other.done, other.failed) == (1, 0)
    assert rows_in(tmp_path) == [failed, again, done]


def test_a_done_row_is_final_also_where_another_follows_it(tmp_path: Path) -> None:
    done, failed = make_result(TICKETS[0]), make_result(TICKETS[0], "failed")
    lines = [msgspec.json.encode(row) + b"\n" for row in (done, failed)]
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines))
    log = ResultsLog(tmp_path)
    log.refresh()
    assert log.row("job0") == done
    assert (log.done, log.failed) == (1, 0)


def test_rows_that_are_being_written_are_not_read_before_they_stay(tmp_path: Path) -> None:
    """As where a disk runs full after some of the rows, which the writer then takes back."""
    log = ResultsLog(tmp_path)
    reader = threading.Thread(target=log.refresh)
    with locked(tmp_path / ".meancache" / "results.lock"):
        log.path.write_bytes(msgspec.json.encode(make_result(TICKETS[0])) + b"\n")
        reader.start()
        time.sleep(0.05)
        log.path.write_bytes(b"")
    reader.join()
    assert log.done == 0


def test_a_log_cut_anywhere_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    lines = [msgspec.json.encode(make_result(ticket)) + b"\n" for ticket in TICKETS[:2]]
    whole = b"".join(lines)
    for length in range(len(whole) + 1):
        (tmp_path / "results.jsonl").write_bytes(whole[:length])
        log = ResultsLog(tmp_path)
        log.refresh()
        assert log.done == (length >= len(lines[0])) + (length == len(whole))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_an_append_makes_a_torn_log_whole_and_keeps_its_rows(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("torn")
    tickets = data.draw(st.lists(st.sampled_from(TICKETS), max_size=5, unique_by=id))
    statuses = [data.draw(st.sampled_from(["done", "failed"])) for _ in tickets]
    rows = [make_result(*pair) for pair in zip(tickets, statuses, strict=True)]
    lines = [msgspec.json.encode(row) + b"\n" for row in rows]
    whole = b"".join(lines)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    kept = rows[: cut.count(b"\n")]
    (directory / "results.jsonl").write_bytes(cut)
    news = [make_result(ticket) for ticket in TICKETS]
    log = ResultsLog(directory)
    written = log.append(news)
    assert written == [new for new in news if new not in kept]
    assert rows_in(directory) == kept + written
    reader = ResultsLog(directory)
    reader.refresh()
    assert (reader.done, reader.failed) == (log.done, log.failed) == (len(TICKETS), 0)


def test_a_piece_that_is_replaced_by_another_row_is_not_read_as_part_of_it(tmp_path: Path) -> None:
    log, other = ResultsLog(tmp_path), ResultsLog(tmp_path)
    log.append([make_result(TICKETS[0])])
    with log.path.open("ab") as file:
        file.write(msgspec.json.encode(make_result(TICKETS[1]))[:-1])
    other.refresh()
    log.append([make_result(TICKETS[2])])
    other.refresh()
    assert [other.status_of(ticket) for ticket in TICKETS[:3]] == ["done", None, "done"]


@pytest.mark.parametrize("damage", [b"{}", b"", b"\0\0\0", b'{"id": "\xff"}', b"[1]", b"half of"])
def test_a_damaged_line_is_named_and_nothing_is_lost(damage: bytes, tmp_path: Path) -> None:
    lines = [msgspec.json.encode(make_result(ticket)) for ticket in TICKETS[:3]]
    content = b"\n".join([lines[0], damage, *lines[1:], b""])
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    log = ResultsLog(tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match=r"line 2 of .*results\.jsonl is not a row.*remove it"):
            log.refresh()
    with pytest.raises(InputError, match="line 2"):
        log.append([make_result(TICKETS[4])])
    assert path.read_bytes() == content
    path.write_bytes(b"\n".join([*lines, b""]))
    assert len(log.append([make_result(ticket) for ticket in TICKETS])) == 3
    assert len(rows_in(tmp_path)) == 6


def test_a_log_that_lost_rows_meanwhile_is_refused(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path)
    log.append([make_result(ticket) for ticket in TICKETS])
    log.path.unlink()
    with pytest.raises(InputError, match=r"had \d+ bytes and has 0; .* remove it to render all"):
        log.refresh()
    with pytest.raises(InputError, match="may only grow"):
        log.append([make_result(TICKETS[0])])


def test_a_directory_in_the_place_of_the_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl" / "a").mkdir(parents=True)
    log = ResultsLog(tmp_path)
    with pytest.raises(InputError, match=r"cannot read .*results\.jsonl: Is a directory"):
        log.refresh()


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="cannot create"):
        ResultsLog(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"prompt": "a hill"}, r"prompt 'a lake', now 'a hill'"),
        ({"negative_prompt": "fog"}, r"negative prompt '', now 'fog'"),
        ({"seed": 1}, r"seed 0, now 1;"),
        ({"guidance_scale": None}, r"guidance scale 3\.5, now None"),
        ({"size": (128, 64)}, r"resolution '64x64', now '128x64'"),
        ({"schedule": FULL}, r"schedule 'b5', now 'full'; schedule's digest"),
        ({"schedule_digest": "d" * 64}, r"as another job: schedule's digest .*, now 'dddd"),
        ({"bundle_id": "c" * 64}, r"bundle 'bbbb.*, noise 'philox' or VAE tiling False, now"),
        ({"seed": 1, "prompt": "a hill"}, r"prompt 'a lake', now 'a hill'; seed 0, now 1"),
    ],
)
def test_a_job_that_is_done_as_another_one_is_refused_with_what_differs(
    changed: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    log = ResultsLog(tmp_path)
    log.append([make_result(make_ticket(job_id="x")), make_result(make_ticket(1))])
    same, other = make_ticket(5, job_id="x"), make_ticket(job_id="x", **changed)
    log.check([same, make_ticket(1), make_ticket(2)])
    with pytest.raises(InputError, match=rf"job 'x' is done in .*{difference}.* the job another"):
        log.check([make_ticket(1), other])
    with pytest.raises(InputError, match="job 'x' is done"):
        log.status_of(other)
    before = log.path.read_bytes()
    with pytest.raises(InputError, match=r"job 'x' was done in .* meanwhile, as another job"):
        log.append([make_result(make_ticket(3)), make_result(other)])
    assert log.path.read_bytes() == before


def test_a_failed_job_may_be_changed(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path)
    log.append([make_result(make_ticket(prompt="too long"), "failed")])
    mended = make_ticket(prompt="short")
    log.check([mended])
    assert log.status_of(mended) is None
    log.append([make_result(mended)])
    assert log.status_of(mended) == "done"
    assert (log.done, log.failed) == (1, 0)


def test_a_full_disk_leaves_the_log_whole_and_room_lets_it_go_on(on_small_disk: RunOnDisk) -> None:
    """Rows of several pages, so that the disk takes some of the bytes before it is full."""
    printed = on_small_disk("""
        from meancache_trt.production.results import ResultsLog

        log = ResultsLog(disk / "out")
        first = [make_result(make_ticket(index)) for index in range(3)]
        fill()
        try:
            log.append(first)
        except InputError as error:
            print(error)
        assert not log.path.exists()
        (disk / "filler").unlink()
        log.append(first)
        whole = log.path.read_bytes()
        fill(but_bytes=8192)
        late = [make_result(make_ticket(index, prompt="hill " * 1000)) for index in range(3, 9)]
        try:
            log.append(late)
        except InputError as error:
            print(error)
        assert log.path.read_bytes() == whole
        assert (log.done, log.row("job2"), log.row("job3")) == (3, first[2], None)
        (disk / "filler").unlink()
        assert log.append(late) == late
        reader = ResultsLog(disk / "out")
        reader.refresh()
        assert [reader.row(row.id) for row in first + late] == first + late
    """)
    lines = printed.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "results.jsonl: No space left on device; it is as it was before" in line


def test_a_read_only_directory_is_refused_and_the_log_can_still_be_left_alone(
    on_small_disk: RunOnDisk,
) -> None:
    printed = on_small_disk("""
        from meancache_trt.production.results import ResultsLog

        log = ResultsLog(disk)
        log.append([make_result(make_ticket(0))])
        before = log.path.read_bytes()
        make_read_only()
        try:
            log.append([make_result(make_ticket(1))])
        except InputError as error:
            print(error)
        assert log.path.read_bytes() == before
    """)
    assert "results.lock: Read-only file system; give an output directory" in printed


def test_threads_that_share_a_log_write_each_row_once(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path)
    rows = [make_result(make_ticket(index)) for index in range(24)]
    written: list[Result] = []

    def work(seed: int) -> None:
        order = random.Random(seed).sample(rows, len(rows))
        for start in range(0, len(order), 3):
            log.refresh()
            written.extend(log.append(order[start : start + 3]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row.id for row in written) == sorted(row.id for row in rows)
    assert sorted(rows_in(tmp_path), key=repr) == sorted(rows, key=repr)
    assert log.done == len(rows)


def append_at_random(directory: Path, seed: int, jobs: int, written: Any) -> None:
    """In a process of its own, which may be killed: reports each append once it is through."""
    log, choice = ResultsLog(directory), random.Random(seed)
    while log.done < jobs:
        tickets = [make_ticket(choice.randrange(jobs)) for _ in range(3)]
        log.append([make_result(ticket, choice.choice(["done", "failed"])) for ticket in tickets])
        for ticket in tickets:
            if log.status_of(ticket) == "done":
                written.send(ticket.job.id)


def test_processes_that_are_killed_lose_no_row_that_was_written(tmp_path: Path) -> None:
    context, choice, jobs = multiprocessing.get_context("spawn"), random.Random(0), 5000
    reported: set[str] = set()
    for turn in range(3):
        ends = [context.Pipe(duplex=False) for _ in range(2)]
        workers = [
            context.Process(target=append_at_random, args=(tmp_path, 10 * turn + n, jobs, sender))
            for n, (_, sender) in enumerate(ends)
        ]
        for worker in workers:
            worker.start()
        for (receiver, sender), worker in zip(ends, workers, strict=True):
            sender.close()
            reported.add(receiver.recv())  # it is at work
            time.sleep(choice.uniform(0, 0.1))
            worker.kill()
            worker.join()
            reported |= received(receiver)
    log = ResultsLog(tmp_path)
    log.append([make_result(make_ticket(index)) for index in range(jobs, jobs + 3)])
    done = [row.id for row in rows_in(tmp_path) if row.status == "done"]
    assert len(done) == len(set(done)) == log.done
    assert reported <= set(done)
    assert len(reported) > 6


def received(receiver: Any) -> set[str]:
    found = set()
    try:
        while True:
            found.add(receiver.recv())
    except (EOFError, OSError):  # the second where it was killed in the middle of a message
        return found
