"""SIGTERM and SIGINT of a long run: end in good order first, at once when asked again."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

INTERRUPTED = 130
"""Exit status of what SIGINT ended, as shells have it: 128 + 2."""

_SAME_PRESS_S = 0.5
"""Programs such as `timeout` send a signal to a process and again to its group: that is one."""

_SHOW_CURSOR = b"\x1b[?25h\n"


@dataclass
class Caught:
    """Which signal came first, if any did, how often SIGINT came, and when last."""

    signal: int | None = None
    interrupts: int = 0
    at_s: float = -math.inf


@contextlib.contextmanager
def stopping(stop: threading.Event, note: Callable[[str], None]) -> Iterator[Caught]:
    """Set `stop` on SIGTERM or SIGINT, and say so once; a second SIGINT ends the process.

    Only in the main thread. What handled the signals before does so again after the block.
    """
    caught = Caught()
    # Of all ways to wake a thread only this one may be used in a handler that has interrupted it.
    arrived: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        now_s = time.monotonic()
        if number == signal.SIGINT and now_s - caught.at_s > _SAME_PRESS_S:
            caught.interrupts += 1
            caught.at_s = now_s
        if caught.interrupts > 1:
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)  # a live view may have hidden it
            os._exit(INTERRUPTED)  # files are renamed when they are whole: none is left half
        caught.signal = caught.signal or number
        arrived.put(number)

    def listen() -> None:
        if arrived.get() is not None:
            stop.set()
            note(
                "stopping: what is being rendered is finished and written"
                + ("; Ctrl-C again ends at once" if caught.interrupts else "")
            )

    listener = threading.Thread(target=listen, name="signals")
    listener.start()
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        arrived.put(None)
        listener.join()
