"""A build in a process of its own: `python -m meancache_trt.engine.tensorrt.worker`.

So that a crash, or the system's killing it where memory runs out, ends one build and not the
program, its memory goes back whole, and it can be stopped at any moment: TensorRT asks its progress
monitor between its phases only, and compiles a transformer in one of them.

The job comes as the first line of standard input, messages go as lines to standard output.
`process` is the other side.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from meancache_trt.engine.tensorrt.builder import BuildJob, Built, build
from meancache_trt.engine.tensorrt.messages import STOP, Failed, Message, Progress, Said
from meancache_trt.errors import MeanCacheError

_ORPHANED = 3
"""The exit status of a worker whose parent is gone."""

_PROGRESS_S = 0.1
"""Seconds between two messages on progress: TensorRT takes thousands of steps in one."""


def main() -> None:
    """Build the job on standard input. Leaves without unwinding: the result is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent says what to do
    send = _sender()
    lines = _lines()
    job = msgspec.json.decode(next(lines), type=BuildJob)
    is_stopped = threading.Event()
    threading.Thread(target=_listen, args=(lines, is_stopped), daemon=True).start()
    send(_result(job, send, is_stopped))
    sys.stderr.flush()
    os._exit(0)


def _result(
    job: BuildJob, send: Callable[[Message], None], is_stopped: threading.Event
) -> Built | Failed:
    last = 0.0

    def advance(share: float) -> bool:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_S:
            last = time.monotonic()
            send(Progress(share))
        return not is_stopped.is_set()

    try:
        return build(job, advance=advance, say=lambda text: send(Said(text)))
    except MeanCacheError as error:
        return Failed(type(error).__name__, str(error))


def _sender() -> Callable[[Message], None]:
    """Writes messages to what standard output was; native libraries now print to standard error."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(message: Message) -> None:
        line = msgspec.json.encode(message) + b"\n"
        with lock:
            while line:
                line = line[os.write(pipe, line) :]

    return send


def _lines() -> Iterator[bytes]:
    """Lines of standard input as they come.

    By its descriptor: a thread that waits in `sys.stdin` would be in the way of the exit.
    """
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"


def _listen(lines: Iterator[bytes], is_stopped: threading.Event) -> None:
    for line in lines:
        if line == STOP:
            is_stopped.set()
    os._exit(_ORPHANED)


if __name__ == "__main__":
    main()
