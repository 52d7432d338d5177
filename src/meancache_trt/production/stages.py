"""Stages that work at the same time, each in threads of its own, with short queues between them.

    put ──▶ [queue] ──▶ stage ──▶ [queue] ──▶ stage ──▶ … ──▶ the last stage keeps what it makes

A queue that is full holds up whoever fills it, so that memory does not grow with the work.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Work = Callable[[Any], Iterable[Any]]
"""One item to those that it becomes, for the next stage."""

OnFailure = Callable[[Any, Exception], None]
"""(item, what its stage raised). What it raises itself stops the conveyor."""

_POLL_S = 0.05
"""How soon a thread that waits for room notices that the conveyor has stopped."""


@dataclass(frozen=True)
class Stage:
    """A kind of work. `make` is called once in each of its threads; what it returns does the work.

    What `make` raises stops the conveyor.
    """

    name: str
    make: Callable[[], Work]
    threads: int = 1


class Conveyor:
    """Stages in a row; use it in a `with` block, at whose end all that was put in is done.

    Args:
        stages: in order.
        room: items that wait before each stage; further ones hold up the stage before.
        on_failure: called in the stage's thread where an item's work raises; the item is then gone
            and the others go on.
        on_stop: called once with the error that stops the conveyor, from any thread.

    An error in a `with` block, in `make` or in `on_failure` stops it: what waits is dropped, what
    is under way is finished. The first such error is raised at the end of the block.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        room: int,
        on_failure: OnFailure,
        on_stop: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self._queues: list[queue.Queue[Any]] = [queue.Queue(room) for _ in stages]
        self._on_failure, self._on_stop = on_failure, on_stop
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self.busy_s = {stage.name: 0.0 for stage in stages}  # of items that are through
        self._under_way: dict[threading.Thread, tuple[str, float]] = {}
        self.threads = {stage.name: stage.threads for stage in stages}
        self._workers = [
            [
                threading.Thread(target=self._run, args=(place, stage), name=stage.name)
                for _ in range(stage.threads)
            ]
            for place, stage in enumerate(stages)
        ]

    @property
    def is_stopped(self) -> bool:
        """Whether an error stopped it."""
        return self._stopped.is_set()

    def waiting(self) -> dict[str, int]:
        """Items before each stage, about."""
        return {
            name: waiting.qsize() for name, waiting in zip(self.busy_s, self._queues, strict=True)
        }

    def busy(self, elapsed_s: float) -> dict[str, float]:
        """The share of their time in which the threads of each stage worked, of `elapsed_s`."""
        with self._lock:
            busy_s = dict(self.busy_s)
            under_way = list(self._under_way.values())
        now = time.perf_counter()
        for name, start in under_way:  # a batch may take minutes
            busy_s[name] += now - start
        return {
            name: min(total_s / (elapsed_s * self.threads[name]), 1.0) if elapsed_s else 0.0
            for name, total_s in busy_s.items()
        }

    def put(self, item: Any) -> None:
        """Hand an item to the first stage; waits while there is no room.

        Drops it where the conveyor has stopped: the end of the block says why.
        """
        self._hand_on(0, item)

    def stop(self, error: BaseException) -> None:
        """Drop what waits, finish what is under way, and raise `error` at the end of the block."""
        with self._lock:
            is_first = self._error is None
            self._error = self._error or error
        self._stopped.set()
        if is_first:
            self._on_stop(error)

    def __enter__(self) -> Conveyor:
        for workers in self._workers:
            for worker in workers:
                worker.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.stop(error)
        for waiting, workers in zip(self._queues, self._workers, strict=True):
            for _ in workers:
                self._offer(waiting, _END, is_kept=True)
            for worker in workers:
                worker.join()
        if self._error is not None and self._error is not error:
            raise self._error

    def _hand_on(self, place: int, item: Any) -> None:
        if place < len(self._queues):
            self._offer(self._queues[place], item, is_kept=False)

    def _offer(self, waiting: queue.Queue[Any], item: Any, *, is_kept: bool) -> None:
        while is_kept or not self.is_stopped:
            try:
                waiting.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return

    def _run(self, place: int, stage: Stage) -> None:
        try:
            work = stage.make()
        except BaseException as error:
            self.stop(error)
        while (item := self._queues[place].get()) is not _END:
            if not self.is_stopped:
                self._do(place, stage, work, item)

    def _do(self, place: int, stage: Stage, work: Work, item: Any) -> None:
        start = time.perf_counter()
        with self._lock:
            self._under_way[threading.current_thread()] = stage.name, start
        try:
            made = list(work(item))
        except Exception as error:
            made = []
            self._fail(item, error)
        except BaseException as error:  # such as a panic of a library in Rust
            made = []
            self.stop(error)
        with self._lock:
            del self._under_way[threading.current_thread()]
            self.busy_s[stage.name] += time.perf_counter() - start
        for following in made:
            self._hand_on(place + 1, following)

    def _fail(self, item: Any, error: Exception) -> None:
        try:
            self._on_failure(item, error)
        except BaseException as fatal:
            self.stop(fatal)


_END = object()
