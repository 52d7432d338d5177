"""Claims: one holder at a time among processes and threads, and none after its process."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from meancache_trt.errors import InputError
from meancache_trt.production.claims import Claims, locked
from meancache_trt.production.results import ResultsLog
from tests.production.conftest import RunOnDisk
from tests.production.made import entries_below, make_result, make_ticket


def test_a_name_has_one_holder_in_a_process(tmp_path: Path) -> None:
    claims, others = Claims(tmp_path), Claims(tmp_path)
    claim = claims.try_claim("a")
    assert claim is not None
    assert claim.name == "a"
    assert claims.try_claim("a") is None
    assert others.try_claim("a") is None
    with others.try_claim("b") as other:
        assert other.name == "b"
        assert claims.try_claim("b") is None
    assert claims.try_claim("b") is not None
    claim.release()
    assert others.try_claim("a") is not None


def test_a_claim_is_released_where_its_work_fails(tmp_path: Path) -> None:
    claims = Claims(tmp_path)

    def fail() -> None:
        with claims.try_claim("a"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert claims.try_claim("a") is not None


def test_any_thread_may_release_a_claim_and_no_other_thread_shares_it(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claim = claims.try_claim("a")
    found: list[object] = []

    def in_thread(work: Any) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    in_thread(lambda: found.append(claims.try_claim("a")))
    assert found == [None]
    in_thread(claim.release)
    in_thread(lambda: found.append(claims.try_claim("a")))
    assert found[1] is not None
    claim.release()  # again, which is nothing to who holds it now
    assert claims.try_claim("a") is None


def hold(directory: Path, ready: Any) -> None:
    """In a process of its own, until it is killed; its child goes on."""
    claim = Claims(directory).try_claim("a")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ready.send((claim is not None, child.pid))
    time.sleep(600)


def test_a_claim_goes_with_a_killed_process_though_its_child_lives_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=hold, args=(tmp_path, sender))
    worker.start()
    was_claimed, child = receiver.recv()
    claims = Claims(tmp_path)
    try:
        assert was_claimed
        assert claims.try_claim("a") is None
        worker.kill()
        worker.join()
        assert claims.try_claim("a") is not None
    finally:
        os.kill(child, signal.SIGKILL)  # of a child that has ended already this would raise


def test_thousands_of_claims_leave_empty_files_and_no_open_ones(tmp_path: Path) -> None:
    claims, before = Claims(tmp_path), len(os.listdir("/dev/fd"))  # noqa: PTH208
    for number in range(2000):
        with claims.try_claim(f"{number:064x}"):
            pass
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208
    folder = tmp_path / ".meancache" / "locks"
    assert sum(path.stat().st_size for path in folder.iterdir()) == 0


def test_waiting_for_a_lock_ends_with_its_release(tmp_path: Path) -> None:
    seen: list[str] = []

    def second() -> None:
        with locked(tmp_path / "a.lock"):
            seen.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path / "a.lock"):
        thread.start()
        time.sleep(0.05)
        seen.append("first")
    thread.join()
    assert seen == ["first", "second"]


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    claims = Claims(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with (
            pytest.warns(UserWarning, match="flock not supported"),
            pytest.raises(InputError, match=r"has no file locks.*on another one"),
        ):
            claims.try_claim("a")
    assert not claims.path("a").exists()


def test_a_directory_that_cannot_be_written_is_refused(on_small_disk: RunOnDisk) -> None:
    printed = on_small_disk("""
        from meancache_trt.production.claims import Claims

        claims = Claims(disk / "out")
        make_read_only()
        for work in (lambda: claims.try_claim("a"), lambda: Claims(disk / "other")):
            try:
                work()
            except InputError as error:
                print(error)
    """)
    first, second = printed.splitlines()
    assert "cannot lock" in first
    assert "a.lock: Read-only file system; give an output directory that is writable" in first
    assert "cannot create" in second


def work_alone(directory: Path, seed: int, names: int) -> None:
    """In a process of its own: what two at a time did would raise FileExistsError."""
    claims, order = Claims(directory), list(range(names))
    random.Random(seed).shuffle(order)
    for number in order:
        if claim := claims.try_claim(str(number)):
            with claim:
                busy = directory / f"{number}.busy"
                busy.touch(exist_ok=False)
                busy.unlink()


def test_no_two_processes_hold_a_name_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work_alone, args=(tmp_path, 0, 300)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not list(tmp_path.glob("*.busy"))


def do_jobs(directory: Path, jobs: int, seed: int) -> None:
    """In a process of its own: the protocol of a run, its pictures a line in a file of the job."""
    claims, log, choice = Claims(directory), ResultsLog(directory), random.Random(seed)
    tickets = [make_ticket(index) for index in range(jobs)]
    while log.done < jobs:
        ticket = choice.choice(tickets)
        if claim := claims.try_claim(ticket.job.id):
            with claim:
                log.refresh()
                if log.status_of(ticket) is None:
                    (directory / f"{ticket.job.id}.txt").write_text(ticket.digest)
                    time.sleep(0.002)
                    log.append([make_result(ticket)])
        log.refresh()


def test_jobs_are_done_once_though_their_processes_are_killed(tmp_path: Path) -> None:
    context, choice, jobs = multiprocessing.get_context("spawn"), random.Random(1), 60
    for turn in range(4):
        workers = [
            context.Process(target=do_jobs, args=(tmp_path, jobs, 10 * turn + n)) for n in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            if turn < 3:
                time.sleep(choice.uniform(0.2, 0.5))
                worker.kill()
            worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    log = ResultsLog(tmp_path)
    log.refresh()
    assert log.done == jobs == len(log.path.read_text().splitlines())
    names = {f"job{index}.txt" for index in range(jobs)}
    assert names == {name for name in entries_below(tmp_path) if name.endswith(".txt")}
