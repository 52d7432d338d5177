"""A run: every job of a list rendered once, whatever happens in between.

    claim a chunk ──▶ encode ──▶ denoise ──▶ decode ──▶ write files, then their rows in the log

A row in the results log is what makes a job done. Several processes may run in one directory: each
claims chunks that nobody else holds, and takes over those whose process has died.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meancache_trt.errors import InputError, RenderError
from meancache_trt.media.formats import OutputFormat
from meancache_trt.production.batch_sizes import DEFAULT_LIMIT, choose_batch
from meancache_trt.production.chunks import Chunk, chunks_of, group_name
from meancache_trt.production.claims import Claim, Claims
from meancache_trt.production.limits import Guard
from meancache_trt.production.names import NameTemplate, check_unique
from meancache_trt.production.outputs import OutputDirectory
from meancache_trt.production.recorder import Recorder
from meancache_trt.production.results import ResultsLog
from meancache_trt.production.run_folder import (
    GroupSizes,
    RunRecord,
    agreed_sizes,
    open_run,
    scratch,
)
from meancache_trt.production.snapshot import Snapshot
from meancache_trt.production.stages import Conveyor, Stage
from meancache_trt.production.tickets import Settings, Ticket
from meancache_trt.production.work import (
    Cancelled,
    Decode,
    Denoise,
    Encode,
    Encoded,
    Failure,
    Latents,
    Pictures,
)
from meancache_trt.render import Pipeline

BATCHES_A_CHUNK = 4
"""Where prompts differ in text length, a chunk is cut into batches of one length each: the more
prompts, the fuller these are, and the more is rendered again after a kill."""

_ROOM = 1
"""Items that wait before a stage: the next one is there when a stage ends one. More would only be
claimed earlier, and keep other processes from them."""

_WRITERS = 2
"""Threads that compress and write: one may wait for the disk while the other compresses."""

_LOOK_AGAIN_S = 0.5
"""How often a process that has nothing to do looks whether others left something."""


@dataclass(frozen=True)
class RunOptions:
    """How a job list is rendered and where to.

    `workers` are threads that denoise side by side, each with memory of its own. `batch` is a size
    instead of one that is measured, up to `batch_limit`. After `max_failures` failed jobs the run
    stops; `timeout_s` is for the loop of a batch. With `is_any_version_allowed` a run that another
    version of the runtime began is gone on with.
    """

    output: Path
    formats: tuple[OutputFormat, ...]
    names: NameTemplate
    guard: Guard
    workers: int = 1
    batch: int | None = None
    batch_limit: int = DEFAULT_LIMIT
    max_failures: int | None = None
    timeout_s: float | None = None
    is_failed_retried: bool = False
    is_any_version_allowed: bool = False


class _OpenChunk:
    """A chunk that this process works on."""

    def __init__(self, chunk: Chunk, claim: Claim, undone: frozenset[int]) -> None:
        self.chunk, self.claim, self.undone = chunk, claim, undone
        self._left = len(chunk.tickets)
        self._lock = threading.Lock()

    def finish(self, pictures: int) -> bool:
        """Count what is through, or need not be made; whether all is, which releases the claim."""
        with self._lock:
            self._left -= pictures
            if self._left == 0:
                self.claim.release()
            return self._left == 0


class Run:
    """Renders tickets of one bundle into a directory; `run` once.

    Raises `InputError` where the directory cannot be used, holds a run with other settings, or has
    results of other jobs with these ids, or where two jobs would be written to one file.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        tickets: Sequence[Ticket],
        settings: Settings,
        options: RunOptions,
    ) -> None:
        self._pipeline, self._tickets = pipeline, tickets
        self._settings, self._options = settings, options
        self._names = {ticket.index: options.names.fill(ticket) for ticket in tickets}
        check_unique((ticket.job.id, self._names[ticket.index]) for ticket in tickets)
        for size in {ticket.group.resolution.size for ticket in tickets}:
            for form in options.formats:
                form.check(size)
        open_run(
            options.output,
            self._wanted(),
            is_any_version_allowed=options.is_any_version_allowed,
        )
        self._own_failures: set[str] = set()
        self._log = ResultsLog(options.output)
        self._log.refresh()
        self._log.check(tickets)
        self._check_files()
        self._claims = Claims(options.output)
        self._earlier = sum(not self._is_undone(ticket) for ticket in tickets)
        self._failed_before = self._log.failed
        self._logged_before = self._log.done + self._log.failed
        self._done = 0
        self._open: dict[int, _OpenChunk] = {}  # by ticket index
        self._lock = threading.Lock()
        self._conveyor: Conveyor | None = None
        self._started = self._ended = 0.0

    def run(self, stop: threading.Event) -> Snapshot:
        """Render what is undone; once `stop` is set, end when what is under way is done.

        Raises `InputError` where files cannot be written or a limit of the guard is reached, and
        `RenderError` after too many failures. What was done by then is in the log.
        """
        with self.opened(stop):
            self.feed(self.chunks(), stop)
        return self.snapshot(is_stopped=stop.is_set())

    @contextlib.contextmanager
    def opened(self, stop: threading.Event) -> Iterator[None]:
        """The stages at work, for `feed`; the end waits for what is under way and raises as `run`.

        Where `stop` is set by then, what is not under way is dropped.
        """
        self._started = time.monotonic()
        with scratch(self._options.output) as temporary:
            output = OutputDirectory(self._options.output, temporary)
            self._conveyor = Conveyor(self._stages(output, stop), room=_ROOM, on_failure=_give_up)
            try:
                with self._conveyor:
                    yield
            finally:
                for left in self._open.values():
                    left.claim.release()
                self._ended = time.monotonic()

    def snapshot(self, *, is_stopped: bool = False) -> Snapshot:
        """How far it is; from any thread."""
        elapsed_s = (self._ended or time.monotonic()) - self._started if self._started else 0.0
        done, failed = self._done, len(self._own_failures)
        logged = self._log.done + self._log.failed - self._logged_before
        conveyor = self._conveyor
        return Snapshot(
            jobs=len(self._tickets),
            earlier=self._earlier,
            done=done,
            failed=failed,
            others=max(logged - done - failed, 0),
            elapsed_s=elapsed_s,
            busy=conveyor.busy(elapsed_s) if conveyor else {},
            waiting=conveyor.waiting() if conveyor else {},
            is_stopped=is_stopped,
        )

    def _check_files(self) -> None:
        """Raise `InputError` where a job would replace the file of another that is done."""
        for ticket in filter(self._is_undone, self._tickets):
            for form in self._options.formats:
                path = self._names[ticket.index] + form.suffix
                owner = self._log.owner_of(path)
                if owner not in (None, ticket.job.id):
                    raise InputError(
                        f"job {ticket.job.id!r} would be written to {path}, which is the file of "
                        f"job {owner!r} that is done; put {{id}} into the name template, or give "
                        "another output directory"
                    )

    def _wanted(self) -> RunRecord:
        runtime, options = self._pipeline.runtime, self._options
        return RunRecord(
            bundle_id=self._pipeline.bundle.manifest.bundle_id,
            runtime=runtime.name,
            runtime_version=runtime.version,
            precision=self._pipeline.graphs.network("transformer").precision,
            text_precision=self._pipeline.text_precision,
            noise=self._settings.noise,
            vae_tiling=self._settings.vae_tiling,
            formats=tuple(f"{form.name}:{form.used_quality}" for form in options.formats),
            name_template=str(options.names),
            batch_size=options.batch,
        )

    def chunks(self) -> list[Chunk]:
        """All jobs as chunks, the same in every process; the first one measures batch sizes."""
        jobs = Counter(ticket.group for ticket in self._tickets)
        members = {ticket.group: ticket for ticket in self._tickets}
        sizes = {group: self._sizes(members[group], count) for group, count in jobs.items()}
        return chunks_of(
            self._tickets,
            lambda group: sizes[group].batch_size,
            lambda group: sizes[group].batches_a_chunk,
        )

    def _sizes(self, ticket: Ticket, jobs: int) -> GroupSizes:
        """What all processes of the run cut a group by: measured by the first that meets it."""
        options, graphs = self._options, self._pipeline.graphs

        def measure() -> GroupSizes:
            batch = options.batch
            if batch is None:
                limit, workers = min(options.batch_limit, jobs), options.workers
                batch, _ = choose_batch(graphs, ticket.group, limit=limit, workers=workers)
            has_lengths = len(graphs.bundle.export.text_lengths) > 1
            return GroupSizes(batch, BATCHES_A_CHUNK if has_lengths else 1)

        return agreed_sizes(options.output, group_name(ticket), measure)

    def feed(self, chunks: Iterable[Chunk], stop: threading.Event) -> None:
        """Put in every chunk that has something undone, once nobody else holds it.

        Returns when all are in or done, `stop` is set, or the stages have failed, which the end of
        `opened` raises. One thread at a time. Raises `InputError` as `run` does.
        """
        assert self._conveyor is not None
        left = list(chunks)
        while left and not stop.is_set():
            held = [chunk for chunk in left if not stop.is_set() and not self._begin(chunk)]
            if self._conveyor.is_stopped:
                return
            if len(held) == len(left):  # others are at all of them
                stop.wait(_LOOK_AGAIN_S)
            left = held

    def is_through(self, chunks: Iterable[Chunk]) -> bool:
        """Whether chunks that were fed need no waiting for: they are done, or the stages failed."""
        return self.is_failed or not any(map(self._undone, chunks))

    @property
    def is_failed(self) -> bool:
        """Whether the stages have stopped with an error, which the end of `opened` raises."""
        return self._conveyor is not None and self._conveyor.is_stopped

    def _begin(self, chunk: Chunk) -> bool:
        """Take on a chunk; false where another process holds it."""
        assert self._conveyor is not None
        self._log.refresh()
        if not self._undone(chunk):
            return True
        self._options.guard.check()
        claim = self._claims.try_claim(chunk.name)
        if claim is None:
            return False
        self._log.refresh()  # whoever held it may have ended it since
        undone = self._undone(chunk)
        if not undone:
            claim.release()
            return True
        opened = _OpenChunk(chunk, claim, undone)
        self._open.update({ticket.index: opened for ticket in chunk.tickets})
        self._conveyor.put(opened)
        return True

    def _undone(self, chunk: Chunk) -> frozenset[int]:
        return frozenset(ticket.index for ticket in chunk.tickets if self._is_undone(ticket))

    def _is_undone(self, ticket: Ticket) -> bool:
        match self._log.status_of(ticket):
            case "done":
                return False
            case "failed":
                return self._options.is_failed_retried and ticket.job.id not in self._own_failures
            case _:
                return True

    def _stages(self, output: OutputDirectory, stop: threading.Event) -> list[Stage]:
        pipeline, settings, options = self._pipeline, self._settings, self._options
        needs_pixels = any(form.needs_pixels for form in options.formats)

        def encode() -> Callable[[_OpenChunk], list[Encoded | Failure]]:
            graphs = pipeline.graphs.lane()
            work = Encode(graphs, pipeline.encoder_on(graphs))
            return lambda opened: [] if stop.is_set() else self._encoded(opened, work)

        def denoise() -> Callable[[Encoded | Failure], list[Latents | Failure]]:
            work = Denoise(pipeline.graphs, settings)
            return lambda item: [] if stop.is_set() else work(_timed(item, options.timeout_s))

        def decode() -> Callable[[Latents | Failure], list[Pictures | Failure]]:
            return Decode(pipeline.graphs.lane(), settings, needs_pixels=needs_pixels)

        def write() -> Callable[[Pictures | Failure], list[None]]:
            recorder = Recorder(pipeline, settings, options.formats, self._names, output)
            return lambda item: self._written(item, recorder)

        return [
            Stage("encode", encode),
            Stage("denoise", denoise, options.workers),
            Stage("decode", decode),
            Stage("write", write, _WRITERS),
        ]

    def _encoded(self, opened: _OpenChunk, work: Encode) -> list[Encoded | Failure]:
        """The batches of a chunk that have a job undone, whole: they are formed of all its jobs."""
        needed: list[Encoded | Failure] = []
        for item in work(opened.chunk.tickets, opened.chunk.batch_size):
            tickets = (item.ticket,) if isinstance(item, Failure) else item.tickets
            if any(ticket.index in opened.undone for ticket in tickets):
                needed.append(item)
            else:
                self._finish(opened, len(tickets))
        return needed

    def _finish(self, opened: _OpenChunk, pictures: int) -> None:
        if opened.finish(pictures):
            for ticket in opened.chunk.tickets:
                del self._open[ticket.index]

    def _written(self, item: Pictures | Failure, recorder: Recorder) -> list[None]:
        """Files first, then their rows: a row says that the files are there."""
        tickets = (item.ticket,) if isinstance(item, Failure) else item.tickets
        opened = self._open[tickets[0].index]  # an item is of one chunk
        rows = self._log.append(recorder.record(item, opened.undone))
        with self._lock:
            self._done += sum(row.status == "done" for row in rows)
            self._own_failures |= {row.id for row in rows if row.status == "failed"}
        self._finish(opened, len(tickets))
        self._check_failures()
        return []

    def _check_failures(self) -> None:
        allowed = self._options.max_failures
        # Of all processes; a job that fails again was counted before this run.
        failed = max(self._log.failed - self._failed_before, len(self._own_failures))
        if allowed is not None and failed > allowed:
            raise RenderError(
                f"{failed} jobs have failed, {allowed} are allowed; {self._log.path} says why. "
                "Run again with --retry-failed when that is mended"
            )


def _timed(item: Encoded | Failure, timeout_s: float | None) -> Encoded | Failure:
    """A batch whose loop ends after `timeout_s`, at the next evaluation."""
    if isinstance(item, Failure) or timeout_s is None:
        return item
    end = time.monotonic() + timeout_s

    def check(done: int, budget: int) -> None:
        if time.monotonic() > end:
            raise Cancelled(
                f"the loop took longer than {timeout_s:g} s, with {done} of {budget} evaluations "
                "done; allow more, or render smaller batches"
            )

    return replace(item, on_evaluation=check)


def _give_up(item: object, error: Exception) -> None:
    """What a stage raises is no fault of a job: those are carried on as `Failure`."""
    del item
    raise error
