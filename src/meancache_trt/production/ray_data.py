"""A run over the actors of a Ray cluster, by Ray Data.

    driver: share numbers ──▶ Ray Data's actor pool ──▶ one row for each share that is through
    actor:  a bundle, the whole job list, a `Run` in the output directory ──▶ files, results log

An actor is one more process in the output directory, with the claims, batches and log that all
have, so what holds for several processes holds here. Ray Data places the actors, hands out the
shares, starts dead actors again and tries their shares again; jobs that have a row are skipped.

A share is no list of jobs but a number: share 3 of 64 is that part of the chunks, which are the
same in every process. The driver could not name chunks: it may have no GPU to measure batches on.
The jobs are put into the object store once, where all actors of a node read one copy; each checks
them against its own bundle, so that no schedule travels.

Every node needs this package, the bundle at the same path, and the output directory on a file
system that all share and that has file locks: without them a run ends with an `InputError`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from meancache_trt import errors
from meancache_trt.errors import InputError, MeanCacheError, RenderError
from meancache_trt.export.text import TextPrecision
from meancache_trt.meancache.schedule import load_schedule
from meancache_trt.production.chunks import Chunk
from meancache_trt.production.jobs import Job, Limits
from meancache_trt.production.ray_cluster import (
    Cluster,
    actor_pool,
    import_ray,
    joined_cluster,
    last_line,
    quiet_data_context,
)
from meancache_trt.production.results import ResultsLog
from meancache_trt.production.run import Run, RunOptions
from meancache_trt.production.run_folder import scratch
from meancache_trt.production.snapshot import Snapshot
from meancache_trt.production.tickets import Checker, Defaults, Settings, Ticket
from meancache_trt.render import load

_AT_ONCE = 3
"""Shares that an actor has at a time, so that its stages stay full where a share is one chunk."""

SHARES_AN_ACTOR = 64
"""At the end of a run an actor may have nothing left while another still has `_AT_ONCE` shares:
less than a twentieth of its time."""

_LOOK_S = 0.5
"""How often the driver reads the log, and an actor looks whether it is to stop."""

_POLL_S = 0.05
"""How soon an actor notices that a share is through: less than a batch takes."""


@dataclass(frozen=True)
class Opening:
    """How each actor opens the bundle: arguments of `meancache_trt.load`.

    `threads` 0 shares the cores of a node among its actors. Relative paths are the driver's.
    """

    bundle: Path
    backend: str = "auto"
    threads: int = 0
    precision: str | None = None
    embedding_cache: Path | str | None = None
    text_precision: TextPrecision = "float32"


@dataclass(frozen=True)
class _Order:
    """What all actors are told. They stop when the directory `wanted` goes away."""

    opening: Opening
    settings: Settings
    defaults: Defaults
    limits: Limits
    options: RunOptions
    shares: int
    wanted: Path


class RayRun:
    """Renders tickets of one bundle into a directory, as `Run` does, but on a Ray cluster.

    Tickets are those that a `Checker` with these settings, defaults and limits made; `defaults` may
    name a schedule file of this machine. Needs `meancache-trt[ray]`; raises
    `RuntimeUnavailableError` without it.
    """

    def __init__(
        self,
        opening: Opening,
        tickets: Sequence[Ticket],
        options: RunOptions,
        cluster: Cluster,
        *,
        settings: Settings,
        defaults: Defaults,
        limits: Limits,
    ) -> None:
        import_ray()
        self._opening, self._options = _absolute(opening, options)
        self._defaults = _without_path(defaults)
        self._settings, self._limits, self._cluster = settings, limits, cluster
        self._tickets = tickets
        self._log = ResultsLog(self._options.output)
        self._log.refresh()
        self._log.check(tickets)
        self._before = self._log.done, self._log.failed
        self._earlier = sum(not self._is_undone(ticket) for ticket in tickets)
        self._started = self._ended = 0.0

    def run(self, stop: threading.Event) -> Snapshot:
        """Render what is undone; once `stop` is set, actors end what they have under way.

        Ray is started for the run, and shut down, where the cluster has no address and this process
        no Ray. A handler of SIGTERM that the caller has set stays.

        Raises what `Run.run` does, whichever actor met it first; the others then end what they
        have under way. Raises `RuntimeUnavailableError` where no cluster can be joined there,
        and `RenderError` where Ray gives up.
        """
        self._started = time.monotonic()
        try:
            with (
                scratch(self._options.output) as wanted,
                self._watching(stop, wanted),
                joined_cluster(self._cluster.address, self._content()) as jobs,
            ):
                self._check(self._outcomes(wanted, jobs), wanted)
            with scratch(self._options.output):
                pass  # clears away what killed actors have left
        finally:
            self._ended = time.monotonic()
        self._log.refresh()
        return self.snapshot(is_stopped=stop.is_set())

    def snapshot(self, *, is_stopped: bool = False) -> Snapshot:
        """How far it is; from any thread. Jobs that other processes did count as its own."""
        done, failed = self._log.done - self._before[0], self._log.failed - self._before[1]
        elapsed_s = (self._ended or time.monotonic()) - self._started if self._started else 0.0
        return Snapshot(
            jobs=len(self._tickets),
            earlier=self._earlier,
            done=done,
            failed=max(failed, 0),  # one that had failed before may be done now
            others=0,
            elapsed_s=elapsed_s,
            is_stopped=is_stopped,
        )

    def _is_undone(self, ticket: Ticket) -> bool:
        status = self._log.status_of(ticket)
        return status is None or (status == "failed" and self._options.is_failed_retried)

    def _content(self) -> bytes:
        return msgspec.json.encode([(ticket.index, ticket.job) for ticket in self._tickets])

    @contextlib.contextmanager
    def _watching(self, stop: threading.Event, wanted: Path) -> Iterator[None]:
        """Follow the log, and tell the actors when to stop."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_LOOK_S):
                if stop.is_set():
                    _withdraw(wanted)
                with contextlib.suppress(InputError):  # the actors read it too, and say so
                    self._log.refresh()

        thread = threading.Thread(target=watch, name="ray-watch")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _outcomes(self, wanted: Path, jobs: Any) -> Iterator[Mapping[str, str]]:
        """A row for each share that is through, as they come."""
        ray = import_ray()
        pool = actor_pool(ray.nodes(), self._cluster, self._opening.threads, self._options.workers)
        shares = max(1, min(len(self._tickets), pool.actors * SHARES_AN_ACTOR))
        order = _Order(
            replace(self._opening, threads=pool.threads),
            self._settings,
            self._defaults,
            self._limits,
            self._options,
            shares,
            wanted,
        )
        with quiet_data_context():
            numbers = ray.data.from_items(
                [{"share": number} for number in range(shares)], override_num_blocks=shares
            )
            # Ray Data starts dead actors again and tries their shares again without end.
            outcomes = numbers.map_batches(
                ShareActor,
                batch_size=1,
                fn_constructor_args=(order, jobs),
                compute=ray.data.ActorPoolStrategy(
                    size=pool.actors,
                    max_tasks_in_flight_per_actor=_AT_ONCE,
                    max_concurrent_calls_per_actor=_AT_ONCE,
                    enable_true_multi_threading=True,
                ),
                **pool.resources,
            )
            yield from outcomes.iter_rows()

    def _check(self, outcomes: Iterator[Mapping[str, str]], wanted: Path) -> None:
        """Wait for all; raise the first error, after the others have ended in order."""
        ray = import_ray()
        first: MeanCacheError | None = None
        try:
            for outcome in outcomes:
                if outcome["error"] and first is None:
                    first = getattr(errors, outcome["error"])(outcome["message"])
                    _withdraw(wanted)
        except ray.exceptions.RayError as error:
            raise RenderError(
                f"Ray ended the run: {last_line(error)}. Run the same command again: it goes on "
                "where it stopped"
            ) from error
        if first is not None:
            raise first


class ShareActor:
    """A process of a run: Ray Data makes it, and calls it with one share at a time, or a few."""

    def __init__(self, order: _Order, jobs: Any) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._resources = contextlib.ExitStack()
        self._error: MeanCacheError | None = None
        threading.Thread(target=_await_end, args=(order.wanted, self._stop), daemon=True).start()
        try:
            self._chunks = self._open(order, jobs)
        except MeanCacheError as error:  # Ray would take it for a dead process
            self._end(error)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Render a share; returns when its jobs have their rows, or with the run's error."""
        try:
            if not self._stop.is_set():
                self._render(int(batch["share"][0]))
            if self._stop.is_set() or self._run.is_failed:
                self._end(None)
        except MeanCacheError as error:
            self._end(error)
        name = type(self._error).__name__ if self._error else ""
        return {"error": [name], "message": [str(self._error or "")]}

    def __del__(self) -> None:  # what Ray Data calls at the end
        self._end(None)

    def _open(self, order: _Order, jobs: Any) -> list[list[Chunk]]:
        """Join the run in the output directory; all chunks, share by share."""
        opening = order.opening
        pipeline = self._resources.enter_context(
            load(
                opening.bundle,
                backend=opening.backend,
                threads=opening.threads,
                precision=opening.precision,
                embedding_cache=opening.embedding_cache,
                text_precision=opening.text_precision,
            )
        )
        checker = Checker(pipeline, order.settings, order.defaults, order.limits)
        content = msgspec.json.decode(import_ray().get(jobs), type=list[tuple[int, Job]])
        tickets = [checker.check(index, job) for index, job in content]
        self._run = Run(pipeline, tickets, order.settings, order.options)
        self._resources.enter_context(self._run.opened(self._stop))
        return shared_out(self._run.chunks(), order.shares)

    def _render(self, number: int) -> None:
        share = self._chunks[number]
        with self._lock:
            self._run.feed(share, self._stop)
        while not (self._stop.is_set() or self._run.is_through(share)):
            self._stop.wait(_POLL_S)

    def _end(self, error: MeanCacheError | None) -> None:
        """End what is under way, close the bundle, and keep the first error."""
        self._stop.set()
        with self._lock:  # nobody feeds the stages meanwhile
            try:
                self._resources.close()
            except MeanCacheError as found:
                error = error or found
            self._error = self._error or error


def shared_out(chunks: Sequence[Chunk], shares: int) -> list[list[Chunk]]:
    """Chunks in `shares` parts of neighbours, which need the same sessions; some may be empty."""
    cuts = [number * len(chunks) // shares for number in range(shares + 1)]
    return [list(chunks[start:end]) for start, end in itertools.pairwise(cuts)]


def _await_end(wanted: Path, stop: threading.Event) -> None:
    while not stop.wait(_LOOK_S):
        if not wanted.exists():
            stop.set()


def _withdraw(wanted: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        wanted.rmdir()


def _absolute(opening: Opening, options: RunOptions) -> tuple[Opening, RunOptions]:
    """The same paths for actors, whose working directory is another."""
    cache = opening.embedding_cache
    if cache is not None and str(cache) != "off":
        cache = Path(cache).resolve()
    guard = replace(options.guard, directory=options.guard.directory.resolve())
    return (
        replace(opening, bundle=Path(opening.bundle).resolve(), embedding_cache=cache),
        replace(options, output=options.output.resolve(), guard=guard),
    )


def _without_path(defaults: Defaults) -> Defaults:
    """Defaults whose schedule is no file, which actors elsewhere could not read."""
    schedule = defaults.schedule
    if isinstance(schedule, str | Path) and Path(schedule).suffix == ".json":
        return replace(defaults, schedule=load_schedule(schedule))
    return defaults
