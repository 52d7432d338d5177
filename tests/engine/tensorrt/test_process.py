"""Builds in processes of their own, and every way in which they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from meancache_trt.engine.tensorrt.builder import BuildJob
from meancache_trt.engine.tensorrt.process import run_build
from meancache_trt.engine.tensorrt.record import ShapeRange
from meancache_trt.errors import PlanError, RuntimeUnavailableError
from meancache_trt.meancache.hashing import sha256_of
from tests.engine.tensorrt.jobs import SLOW_HISTORY, make_job, write_update

DEADLINE_S = 30.0
"""Of what ends in two or three seconds on an idle machine."""


def update_job(folder: Path, history: int) -> BuildJob:
    component, profile = write_update(folder, history)
    return make_job(folder / component.path, folder, profile)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"{pid} still runs"
        time.sleep(0.05)


def test_a_worker_builds_what_this_process_would(tmp_path: Path) -> None:
    job = update_job(tmp_path, 2)
    shares: list[float] = []
    built = run_build(job, report=shares.append)
    assert (built.size_bytes, built.sha256) == (
        Path(job.plan).stat().st_size,
        sha256_of(Path(job.plan)),
    )
    assert {*built.inputs} == {"latent", "model_output", "history_1", "weights"}
    assert shares == sorted(shares)


def test_errors_come_back_as_they_were_raised(tmp_path: Path) -> None:
    job = make_job(tmp_path / "none.onnx", tmp_path, {"one": ShapeRange((1,), (1,), (1,))})
    with pytest.raises(PlanError, match=r"cannot parse .*none\.onnx"):
        run_build(job)
    other = msgspec.structs.replace(job, key=msgspec.structs.replace(job.key, flavour="tensorrt"))
    try:
        import tensorrt  # noqa: F401, PLC0415
    except ImportError:
        with pytest.raises(RuntimeUnavailableError, match=r"meancache-trt\[tensorrt\]"):
            run_build(other)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (signal.SIGKILL, "was killed, as the system does where memory runs out.*Free some"),
        (signal.SIGSEGV, "ended with SIGSEGV.*nothing was changed"),
    ],
)
def test_a_worker_that_is_killed_is_one_error_and_no_crash(
    tmp_path: Path, end: signal.Signals, message: str
) -> None:
    job = update_job(tmp_path, SLOW_HISTORY)
    pids: list[int] = []

    def kill(share: float) -> None:
        os.kill(pids[0], end)

    with pytest.raises(PlanError, match=message):
        run_build(job, started=pids.append, report=kill)
    assert not is_running(pids[0])
    assert not Path(job.plan).exists()


def test_an_interrupt_ends_the_worker_in_the_middle_of_a_phase(tmp_path: Path) -> None:
    job = update_job(tmp_path, SLOW_HISTORY)
    pids: list[int] = []

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_build(job, started=pids.append, report=interrupt)
    assert time.monotonic() - start < DEADLINE_S
    assert not is_running(pids[0])
    assert not Path(job.plan).exists()


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    job = update_job(tmp_path, SLOW_HISTORY)
    script = (
        "import sys, msgspec\n"
        "from meancache_trt.engine.tensorrt.builder import BuildJob\n"
        "from meancache_trt.engine.tensorrt.process import run_build\n"
        "job = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildJob)\n"
        "run_build(job, started=lambda pid: print(pid, flush=True))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent:
        parent.stdin.write(msgspec.json.encode(job))
        parent.stdin.close()
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    wait_for_end(worker)
