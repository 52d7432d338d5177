"""Run a build in a worker process, and stop it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

import msgspec

from meancache_trt import errors
from meancache_trt.engine.memory import available_bytes
from meancache_trt.engine.tensorrt.builder import BuildJob, Built
from meancache_trt.engine.tensorrt.messages import STOP, Failed, Message, Progress, Said
from meancache_trt.errors import MeanCacheError, PlanError

_COMMAND = (sys.executable, "-m", "meancache_trt.engine.tensorrt.worker")

_STOP_S = 2.0
"""Seconds that a worker has to end by itself; in a long phase TensorRT does not ask the monitor."""

_TERMINATE_S = 5.0
_LAST_WORDS = 400

Report = Callable[[float], None]
"""Gets the share that is done, 0 to 1."""


def run_build(
    job: BuildJob,
    *,
    report: Report = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    started: Callable[[int], None] = lambda _: None,
) -> Built:
    """Build in a process of its own and wait for it.

    Any exception on this side, such as Ctrl-C's, stops the worker before it goes on; the end of
    this process ends the worker too. The job's plan file is whole where this returns, and anything
    elsewhere: give one that nobody reads yet. `started` gets the worker's process id.

    Raises:
        PlanError: where TensorRT refuses, or the worker was killed or crashed.
        RuntimeUnavailableError: where the flavour is not installed.
    """
    with _worker(job) as (process, words):
        started(process.pid)
        try:
            result = _followed(process, report, say)
        except BaseException:
            _stop(process)
            raise
        status = process.wait()
    if isinstance(result, Built):
        return result
    if result is None:
        raise PlanError(_obituary(job, status, words))
    kind = getattr(errors, result.error, PlanError)
    assert issubclass(kind, MeanCacheError)
    raise kind(result.message)


@contextlib.contextmanager
def _worker(job: BuildJob) -> Iterator[tuple[subprocess.Popen[bytes], list[str]]]:
    """A worker that was given its job; on leaving, the list has its last words on the screen."""
    words: list[str] = []
    with tempfile.TemporaryFile() as screen:
        process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=screen
        )
        try:
            _tell(process, msgspec.json.encode(job) + b"\n")
            yield process, words
        finally:
            _stop(process)
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    _pipe(pipe).close()
            screen.seek(0)
            words += screen.read()[-_LAST_WORDS:].decode(errors="replace").split("\n")


def _followed(
    process: subprocess.Popen[bytes], report: Report, say: Callable[[str], None]
) -> Built | Failed | None:
    """Pass the worker's messages on until its result; None where it ended without one."""
    for line in _pipe(process.stdout):
        try:
            message: Message = msgspec.json.decode(line, type=Message)
        except msgspec.DecodeError:  # cut off in the middle of it
            return None
        if isinstance(message, Progress):
            report(message.share)
        elif isinstance(message, Said):
            say(message.text)
        else:
            return message  # the last one
    return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask, then terminate, then kill. An interrupt meanwhile skips the waiting."""
    if process.poll() is not None:
        return
    try:
        _tell(process, STOP)
        process.wait(_STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.terminate()
        try:
            process.wait(_TERMINATE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def _tell(process: subprocess.Popen[bytes], line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # its end is noticed by whoever waits for it
        _pipe(process.stdin).write(line)
        _pipe(process.stdin).flush()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _obituary(job: BuildJob, status: int, words: list[str]) -> str:
    """Why a worker ended without a result, as far as one can know."""
    what = (
        f"the process that built {job.key.component} for compute capability "
        f"{job.key.compute_capability}"
    )
    if status == -signal.SIGKILL:
        return (
            f"{what} was killed, as the system does where memory runs out; "
            f"{available_bytes() / 1e9:.1f} GB are available now. Free some or build on a machine "
            "with more; nothing was changed"
        )
    name = f"signal {-status}" if status < 0 else f"status {status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name if status < 0 else name
    last = next((line for line in reversed(words) if line.strip()), "it said nothing")
    return (
        f"{what} ended with {name}: {last.strip()}; nothing was changed. Plan again, and report it "
        "where that ends in the same way"
    )
