"""Pictures for a service: each job on its own, in the time that was foretold.

    submit ──▶ encode ──▶ [waiting room: best first] ──▶ denoise ──▶ decode ──▶ future

What passes between the stages are hints that something waits: each takes what is best when it gets
to it, not when the hint was given.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from meancache_trt.errors import InputError, RefusedError, RenderError
from meancache_trt.meancache.loop import OnEvaluation
from meancache_trt.production.batch_sizes import sizes_up_to
from meancache_trt.production.forecast import Forecast
from meancache_trt.production.jobs import Job, Limits
from meancache_trt.production.outcomes import OnOutcome, Outcome, OutcomeKind, too_late
from meancache_trt.production.stages import Conveyor, Stage
from meancache_trt.production.tickets import Checker, Defaults, Settings
from meancache_trt.production.timed_work import TimedWork
from meancache_trt.production.waiting import Entry, WaitingRoom, joined
from meancache_trt.production.work import Cancelled, Failure, Latents, reason
from meancache_trt.render import Pipeline
from meancache_trt.rendering import Rendering

_HINT = object()


@dataclass(frozen=True)
class RendererOptions:
    """How much a renderer takes on, and how it trades latency for throughput.

    `capacity` is how many jobs it has at most, those that are being rendered included. Batches
    have up to `max_batch` pictures, in powers of two; a job waits up to `batch_wait_ms` for others
    of its kind to come, 0 takes only those that are there. `default_deadline_s` is for jobs
    without one; a job that would alone take longer than `max_predicted_ms` is refused.

    A loop that is stoppable ends at the next evaluation when nobody wants its pictures any more.
    One that is not is a single launch on a GPU instead of one for each evaluation. `warm` are jobs
    like those to come, whose resolutions and schedules are made ready and measured before the
    first; by default one that leaves all to the defaults.
    """

    capacity: int = 64
    max_batch: int = 1
    batch_wait_ms: float = 0.0
    default_deadline_s: float | None = None
    max_predicted_ms: float | None = None
    is_stoppable: bool = True
    warm: tuple[Job, ...] = (Job(id="warm-up", prompt="warm-up"),)

    def __post_init__(self) -> None:
        if self.capacity < 1 or self.max_batch < 1 or not 0 <= self.batch_wait_ms < math.inf:
            raise InputError(
                "a renderer has a capacity and a max_batch of 1 or more and a batch_wait_ms of 0 "
                f"or more; found {self.capacity}, {self.max_batch} and {self.batch_wait_ms:g}"
            )
        if not self.warm:
            raise InputError("a renderer warms up on one job or more; give `warm` at least one")


@dataclass(frozen=True)
class RendererStatus:
    """How a renderer is doing: jobs that wait and are being rendered, and what became of others.

    Of those that wait, `ready` ones are encoded. `busy` is the share of `uptime_s` that each stage
    has worked. `closed` is why no more jobs are taken on; None while they are.
    """

    waiting: int
    ready: int
    rendering: int
    outcomes: Mapping[OutcomeKind, int]
    busy: Mapping[str, float]
    uptime_s: float
    closed: str | None


class Renderer:
    """Renders single jobs for many threads; a context manager, warmed up when it is entered.

    Every job that `submit` takes on ends: its future gets a rendering or an exception, or was
    cancelled. Futures can be cancelled until they are done, also while their picture is being made.

    Args:
        pipeline: used by nobody else meanwhile; outlives the renderer.
        settings: of all pictures.
        defaults: for what jobs leave out.
        limits: what jobs may ask for.
        options: see `RendererOptions`.
        on_outcome: called for each job that ends, from the thread that ended it; be quick. What it
            raises in a thread of the renderer stops that.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        settings: Settings = Settings(),  # noqa: B008  frozen
        defaults: Defaults = Defaults(),  # noqa: B008
        limits: Limits = Limits(),  # noqa: B008
        options: RendererOptions = RendererOptions(),
        on_outcome: OnOutcome = lambda _: None,
    ) -> None:
        self._options, self._on_outcome = options, on_outcome
        self._checker = Checker(pipeline, settings, defaults, limits)
        self._forecast = Forecast()
        self._work = TimedWork(pipeline, settings, self._forecast)
        self._text_tokens = pipeline.bundle.export.text_tokens
        self._sizes = sizes_up_to(options.max_batch)
        self._room = WaitingRoom(self._forecast, self._sizes, options.batch_wait_ms / 1e3)
        self._conveyor = Conveyor(
            [
                Stage("encode", lambda: self._encode_next),
                Stage("denoise", lambda: self._denoise_next),
                Stage("decode", lambda: self._decode),
            ],
            room=0,  # without bound: hints are small, and `capacity` bounds the rest
            on_failure=_give_up,
            on_stop=self._end_all,
        )
        self._stack = contextlib.ExitStack()
        self._checking, self._lock = threading.Lock(), threading.Lock()
        self._places = itertools.count()
        self._entries: dict[int, Entry] = {}  # by ticket index: what was taken on and has not ended
        self._counts: Counter[OutcomeKind] = Counter()
        self._closed: str | None = "has not been entered"
        self._started = 0.0

    def __enter__(self) -> Self:
        tickets = [self._entry(job).ticket for job in self._options.warm]
        on_evaluation = _no_stop if self._options.is_stoppable else None
        self._work.warm_up(tickets, self._sizes, on_evaluation)
        self._stack.enter_context(self._conveyor)
        self._started, self._closed = time.monotonic(), None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(is_drained=kind is None)

    def submit(
        self, job: Job, *, deadline_s: float | None = None, priority: int = 0
    ) -> Future[Rendering]:
        """Take on a job; higher priorities first, equal ones in order of arrival.

        The deadline counts from now. A job is given up with `RefusedError` when it could not be
        met any more even at the quickest; once its loop has begun the job is finished, in time or
        late. Jobs of higher priority that come later may so keep one from being rendered.

        Raises:
            InputError: for a job or deadline that is not valid; `Checker.check` has the others.
            RefusedError: where the renderer has as many jobs as it may, is closed, or would
                not be done by the deadline.
        """
        start = time.monotonic()
        given = self._options.default_deadline_s if deadline_s is None else deadline_s
        if given is not None and not given > 0:
            raise InputError(f"deadline_s is above 0, found {given:g}")
        deadline = math.inf if given is None else start + given
        entry = self._entry(job, priority, deadline, start)
        try:
            self._take_on(entry)
        except RefusedError:
            with self._lock:
                self._counts["refused"] += 1
            self._on_outcome(Outcome.of("refused", entry))
            raise
        return entry.future

    def predict_ms(self, job: Job) -> float:
        """How long a job would take alone, from `submit` to its picture.

        Encoding, where a cache has not its texts; preparation; B times the measured evaluation;
        decoding. Each is the median of the last times, under whatever load they were taken. Until a
        prompt is encoded the bundle's longest text length is assumed. Sessions of a schedule that
        was not warmed up are not included. Raises `InputError` as `submit` does.
        """
        entry = self._entry(job)
        return entry.encoding_ms + self._room.times([entry]).total

    def wait_ms(self, job: Job, *, priority: int = 0) -> float:
        """How long a job that came now would wait for others, if none came after it."""
        entry = self._entry(job, priority)
        with self._lock:
            return self._before(entry)[0]

    def status(self) -> RendererStatus:
        """How it is doing now; from any thread."""
        uptime_s = time.monotonic() - self._started if self._started else 0.0
        with self._lock:
            rendering = sum(entry.end is not None for entry in self._entries.values())
            encoded = sum(entry.encoded is not None for entry in self._entries.values())
            return RendererStatus(
                waiting=len(self._entries) - rendering,
                ready=encoded - rendering,
                rendering=rendering,
                outcomes=dict(self._counts),
                busy=self._conveyor.busy(uptime_s),
                uptime_s=uptime_s,
                closed=self._closed,
            )

    def close(self, *, is_drained: bool = True) -> None:
        """Take on no more jobs and finish those there are; or else cancel them.

        Waits until all have ended. Raises what stopped the renderer before, if something did.
        """
        with self._lock:
            self._closed = self._closed or "was closed"
            left = list(self._entries.values())
        self._room.close()
        if not is_drained:
            for entry in left:
                entry.future.cancel()
        try:
            self._stack.close()
        finally:
            for index in list(self._entries):  # of a thread that is gone
                self._end(index, "failed", error=RenderError(f"the renderer {self._closed}"))

    def _entry(
        self, job: Job, priority: int = 0, deadline: float = math.inf, submitted: float = 0.0
    ) -> Entry:
        with self._checking:  # neither the checker nor its pipeline is thread-safe
            ticket = self._checker.check(next(self._places), job)
        encoding_ms = self._forecast.encoding_ms(self._work.uncached_texts(ticket))
        return Entry(ticket, priority, deadline, submitted, self._text_tokens, encoding_ms)

    def _take_on(self, entry: Entry) -> None:
        index = entry.ticket.index
        with self._lock:
            entry.predicted_ms = self._check_acceptable(entry)
            self._entries[index] = entry
            self._room.put(entry)
            self._conveyor.put(_HINT)
        # Ends a job that is cancelled; where it ended otherwise there is nothing left to do.
        entry.future.add_done_callback(lambda _: self._end(index, "cancelled"))

    def _check_acceptable(self, entry: Entry) -> float:
        """Predicted latency in ms. Raises `RefusedError` for what cannot be taken on."""
        if self._closed is not None:
            raise RefusedError(f"the renderer {self._closed}, so it takes on no jobs")
        wait_ms, own_ms = self._before(entry)
        if len(self._entries) >= self._options.capacity:
            raise RefusedError(
                f"the renderer has {len(self._entries)} jobs, which is all it takes on at a time; "
                "try again later",
                retry_after_s=(self._remaining_ms() or own_ms) / 1e3,
            )
        longest_ms = self._options.max_predicted_ms
        if longest_ms is not None and own_ms > longest_ms:
            raise RefusedError(
                f"the job would take {own_ms:,.0f} ms, the limit is {longest_ms:,.0f}; use fewer "
                "evaluations or a smaller size"
            )
        self._check_deadline(entry, wait_ms, own_ms)
        return wait_ms + own_ms

    def _check_deadline(self, entry: Entry, wait_ms: float, own_ms: float) -> None:
        if not self._entries:  # a slow spell must not outlive itself: let a job measure anew
            own_ms = self._room.times([entry], is_quickest=True).total
        left_ms = 1e3 * (entry.deadline - entry.submitted)
        if wait_ms + own_ms <= left_ms:
            return
        raise RefusedError(
            f"the job would be done in {wait_ms + own_ms:,.0f} ms, of which it would wait "
            f"{wait_ms:,.0f}, after its deadline in {left_ms:,.0f} ms; "
            + ("try again later" if own_ms <= left_ms else "allow more time"),
            retry_after_s=(wait_ms + own_ms - left_ms) / 1e3 if own_ms <= left_ms else None,
        )

    def _before(self, entry: Entry) -> tuple[float, float]:
        """What would be done before a job that came now, and it with its batch, in ms."""
        wait_ms, times = self._room.forecast(entry)
        return self._remaining_ms() + wait_ms, entry.encoding_ms + times.total

    def _remaining_ms(self) -> float:
        """Until what is being rendered is done."""
        ends = [entry.end for entry in self._entries.values() if entry.end is not None]
        return max(0.0, 1e3 * (max(ends, default=-math.inf) - time.monotonic()))

    def _encode_next(self, _: object) -> list[object]:
        entry = self._room.next_to_encode()
        if entry is None:  # cancelled
            return []
        made = self._work.encode(entry.ticket)
        if isinstance(made, Failure):
            self._end(entry.ticket.index, "failed", error=made.error)
            return []
        self._room.make_ready(entry, made)
        return [_HINT]

    def _denoise_next(self, _: object) -> list[Latents | Failure]:
        batch, late = self._room.take()
        for entry in late:
            self._end(entry.ticket.index, "expired", error=too_late(entry))
        if not batch:  # cancelled, or rendered with others
            return []
        end = time.monotonic() + self._room.times(batch).total / 1e3
        for entry in batch:
            entry.end = end
        stopper = _stopper(batch) if self._options.is_stoppable else None
        return self._work.denoise(joined(batch, stopper))

    def _decode(self, found: Latents | Failure) -> list[object]:
        if isinstance(found, Failure):
            self._end(found.ticket.index, "failed", error=found.error)
        elif any(ticket.index in self._entries for ticket in found.tickets):
            for made in self._work.decode(found):
                if isinstance(made, Failure):
                    self._end(made.ticket.index, "failed", error=made.error)
                    continue
                for ticket, rendering in zip(made.tickets, made.renderings, strict=True):
                    self._end(ticket.index, "done", rendering=rendering)
        return []

    def _end(
        self,
        index: int,
        kind: OutcomeKind,
        *,
        rendering: Rendering | None = None,
        error: Exception | None = None,
    ) -> None:
        """End a job, if it has not ended before."""
        outcome = self._settle(index, kind, rendering=rendering, error=error)
        if outcome is not None:
            self._on_outcome(outcome)

    def _settle(
        self,
        index: int,
        kind: OutcomeKind,
        *,
        rendering: Rendering | None = None,
        error: Exception | None = None,
    ) -> Outcome | None:
        with self._lock:
            entry = self._entries.pop(index, None)  # whoever finds it here ends it
            if entry is None:
                return None
            is_wanted = entry.future.set_running_or_notify_cancel()
            outcome = Outcome.of(kind if is_wanted else "cancelled", entry)
            self._counts[outcome.kind] += 1
        self._room.remove(entry)
        if is_wanted and error is not None:
            entry.future.set_exception(error)
        elif is_wanted and rendering is not None:
            entry.future.set_result(rendering)
        return outcome

    def _end_all(self, error: BaseException) -> None:
        """What stops the stages is no job's fault, and no future may wait for them."""
        with self._lock:
            self._closed = f"has stopped ({reason(error)})"
            left = list(self._entries)
        ended = [
            self._settle(index, "failed", error=RenderError(f"the renderer {self._closed}"))
            for index in left
        ]
        for outcome in ended:
            if outcome is not None:
                self._on_outcome(outcome)


def _give_up(_: object, error: Exception) -> None:
    raise error


def _stopper(batch: Sequence[Entry]) -> OnEvaluation:
    """Ends the loop of a batch when nobody wants any of its pictures."""

    def check(done: int, budget: int) -> None:
        if all(entry.future.done() for entry in batch):
            raise Cancelled(f"all its jobs were cancelled; {done} of {budget} evaluations are done")

    return check


def _no_stop(done: int, budget: int) -> None:
    """Run a loop evaluation by evaluation."""
