"""Jobs that wait for their loop: which is next, which may share its batch, how long it will be."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from meancache_trt.meancache.loop import OnEvaluation
from meancache_trt.production.forecast import Forecast, Shape, Times
from meancache_trt.production.tickets import Group, Ticket
from meancache_trt.production.work import Encoded
from meancache_trt.rendering import Rendering


@dataclass(eq=False)
class Entry:
    """A job and whom its picture is for.

    `deadline` and `submitted` are seconds of `time.monotonic`; without a deadline it is infinite.
    `text_tokens` is the bundle's full length until the prompt has been encoded, at `ready`. `end`
    is when its batch will be done as predicted, once that has begun.
    """

    ticket: Ticket
    priority: int
    deadline: float
    submitted: float
    text_tokens: int
    encoding_ms: float
    predicted_ms: float = 0.0
    future: Future[Rendering] = field(default_factory=Future)
    is_begun: bool = False
    encoded: Encoded | None = None
    ready: float = math.inf
    end: float | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Lowest first: by priority, then in order of arrival."""
        return -self.priority, self.ticket.index

    @property
    def kind(self) -> tuple[Group, int]:
        """What jobs of one batch have in common."""
        return self.ticket.group, self.text_tokens


class WaitingRoom:
    """Jobs from their arrival until their loop begins; thread-safe.

    Args:
        forecast: tells what a batch would take.
        sizes: that batches may have, ascending from 1.
        batch_wait_s: how long a job that could begin waits for others of its kind.
    """

    def __init__(self, forecast: Forecast, sizes: Sequence[int], batch_wait_s: float) -> None:
        self._forecast, self._sizes, self._batch_wait_s = forecast, sizes, batch_wait_s
        self._entries: dict[int, Entry] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, entry: Entry) -> None:
        """Let a job in."""
        with self._changed:
            self._entries[entry.ticket.index] = entry

    def remove(self, entry: Entry) -> None:
        """Let a job go, if it is still there."""
        with self._changed:
            self._entries.pop(entry.ticket.index, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Hold nobody back any longer for others to come."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def next_to_encode(self) -> Entry | None:
        """The first job whose prompt nobody has begun to encode."""
        with self._changed:
            new = (entry for entry in self._entries.values() if not entry.is_begun)
            entry = min(new, key=_rank, default=None)
            if entry is not None:
                entry.is_begun = True
            return entry

    def make_ready(self, entry: Entry, encoded: Encoded) -> None:
        """Say that a job's prompt is encoded, so that its loop may begin."""
        with self._changed:
            entry.encoded, entry.text_tokens = encoded, encoded.text_tokens
            entry.ready = time.monotonic()
            self._changed.notify_all()

    def take(self) -> tuple[list[Entry], list[Entry]]:
        """The next batch, none where no job is ready; and jobs that are too late for any batch.

        Waits while a job is held back for others.
        """
        late: list[Entry] = []
        with self._changed:
            while True:
                now = time.monotonic()
                late += self._drop_late(now)
                ready = [entry for entry in self._entries.values() if entry.encoded is not None]
                if not ready:
                    return [], late
                batch = self._together(sorted(ready, key=_rank), now)
                held_s = self._held_until(batch) - now
                if held_s <= 0:
                    for entry in batch:
                        del self._entries[entry.ticket.index]
                    return batch, late
                self._changed.wait(held_s)

    def forecast(self, entry: Entry) -> tuple[float, Times]:
        """What would be done before a job that came now, in ms, and its batch.

        As if nobody else came and no deadline kept batches small.
        """
        with self._changed:
            left = sorted([*self._entries.values(), entry], key=_rank)
        before_ms = 0.0
        for batch in self._batches(left):
            times = self.times(batch)
            if entry in batch:
                return before_ms, times
            before_ms += times.total
        raise AssertionError("every job is in a batch")

    def times(self, batch: Sequence[Entry], *, is_quickest: bool = False) -> Times:
        """What a batch takes."""
        first = batch[0]
        shape = Shape.of(first.ticket, first.text_tokens, len(batch))
        budget = first.ticket.group.schedule.budget
        return self._forecast.times(shape, budget, is_quickest=is_quickest)

    def _batches(self, ranked: list[Entry]) -> Iterator[list[Entry]]:
        while ranked:
            batch = self._together(ranked, -math.inf)
            yield batch
            ranked = [entry for entry in ranked if entry not in batch]

    def _together(self, ranked: Sequence[Entry], now: float) -> list[Entry]:
        """The first job and as many of its kind as no deadline of theirs forbids."""
        first = ranked[0]
        alike = [entry for entry in ranked if entry.kind == first.kind]
        for size in reversed(self._sizes):
            some = alike[:size]
            if size == 1 or len(some) < size:
                continue
            end = now + self.times(some).total / 1e3
            fitting = [entry for entry in alike if entry.deadline >= end]
            if first in fitting and len(fitting) >= size:
                return fitting[:size]
        return [first]

    def _held_until(self, batch: Sequence[Entry]) -> float:
        """When a batch begins at the latest, whoever has not come by then."""
        if self._is_closed or len(batch) == self._sizes[-1]:
            return -math.inf
        total_s = self.times(batch).total / 1e3
        ready = min(entry.ready for entry in batch)
        # Half of what the nearest deadline leaves: the other half is for what takes longer.
        spare_s = (min(entry.deadline for entry in batch) - total_s - ready) / 2
        return ready + min(self._batch_wait_s, spare_s)

    def _drop_late(self, now: float) -> list[Entry]:
        """Take out those that would be too late even if they began now and were quick as ever."""
        late = [
            entry
            for entry in self._entries.values()
            if entry.deadline < now + self.times([entry], is_quickest=True).total / 1e3
        ]
        for entry in late:
            del self._entries[entry.ticket.index]
        return late


def joined(batch: Sequence[Entry], on_evaluation: OnEvaluation | None) -> Encoded:
    """What the network is fed for jobs that are ready, all of one kind."""
    encoded = [entry.encoded for entry in batch if entry.encoded is not None]
    conditionings = tuple(part.conditionings[0] for part in encoded)
    tickets = tuple(entry.ticket for entry in batch)
    return Encoded(tickets, batch[0].text_tokens, conditionings, on_evaluation)


def _rank(entry: Entry) -> tuple[int, int]:
    return entry.rank
