"""How fast a run is against a plain loop, and against the denoising evaluations alone."""

from __future__ import annotations

import itertools
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scripts.production.inputs import write_jobs
from scripts.production.outcome import pictures_in
from scripts.production.process import finished, started, wait_for_rows
from scripts.production.runner import read_tickets, run_options

from meancache_trt.production.batch_sizes import choose_batch
from meancache_trt.production.run import Run
from meancache_trt.production.snapshot import Snapshot
from meancache_trt.production.tickets import Settings, Ticket
from meancache_trt.production.work import Denoise, Encode, Encoded
from meancache_trt.render import Pipeline, load


def against_plain_loop(
    bundle: Path, work: Path, *, jobs: int, rounds: int, workers: int = 2
) -> dict[str, Any]:
    """Seconds of a run, batch sizes measured in it, and of `render` and `save` one by one.

    The same jobs of schedule b10, each with a prompt of its own; neither has any in a cache.
    """
    path = write_jobs(work / "jobs.jsonl", jobs, ["b10"], prompts=jobs)
    times: dict[str, list[float]] = {"plain": [], "run": []}
    snapshots = []
    with (
        load(bundle, threads=0, embedding_cache="off") as plain,
        load(bundle, threads=1, embedding_cache="off") as pipeline,
    ):
        tickets = read_tickets(pipeline, path)
        _plain_loop(plain, tickets[:2], work / "first")  # loads graphs, as the first run does
        _run(pipeline, tickets[:2], work / "first-run", workers)
        for number in range(rounds):
            times["plain"].append(_plain_loop(plain, tickets, work / f"plain-{number}"))
            seconds, snapshot = _run(pipeline, tickets, work / f"run-{number}", workers)
            times["run"].append(seconds)
            snapshots.append(snapshot)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "jobs": jobs,
        "workers": workers,
        "seconds": times,
        "pictures_per_s": {name: jobs / seconds for name, seconds in medians.items()},
        "ratio": medians["plain"] / medians["run"],
        "busy": _busy(snapshots),
        "differing_pictures": _differing(work / "plain-0", work / "run-0"),
    }


def against_denoising(
    bundle: Path, work: Path, schedule: str, *, jobs: int, rounds: int, workers: int = 2
) -> dict[str, Any]:
    """The share of a run's time that its denoising evaluations take with as many threads alone."""
    path = write_jobs(work / "jobs.jsonl", jobs, [schedule], prompts=jobs)
    times: dict[str, list[float]] = {"denoising": [], "run": []}
    snapshots = []
    with load(bundle, threads=1, embedding_cache="off") as pipeline:
        tickets = read_tickets(pipeline, path)
        batch, trials = choose_batch(pipeline.graphs, tickets[0].group, workers=workers)
        encoder = Encode(pipeline.graphs, pipeline.encoder_on(pipeline.graphs))
        batches = [item for item in encoder(tickets, batch) if isinstance(item, Encoded)]
        denoise = [Denoise(pipeline.graphs, Settings()) for _ in range(workers)]
        for work_of in denoise:
            work_of(batches[0])  # makes its session
        for number in range(rounds):
            seconds, snapshot = _run(pipeline, tickets, work / f"run-{number}", workers, batch)
            times["run"].append(seconds)
            snapshots.append(snapshot)
            times["denoising"].append(_denoise(denoise, batches))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "jobs": jobs,
        "workers": workers,
        "batch": batch,
        "picture_ms_by_batch": {str(trial.batch): trial.picture_ms for trial in trials},
        "seconds": times,
        "share": medians["denoising"] / medians["run"],
        "busy": _busy(snapshots),
    }


def batch_gains(bundle: Path, work: Path, *, limit: int = 8) -> dict[str, dict[str, float]]:
    """Milliseconds of an evaluation for each picture of a batch, by schedule and batch size."""
    names = ["b6", "b10"]
    path = write_jobs(work / "gains.jsonl", len(names), names)
    with load(bundle, threads=1, embedding_cache="off") as pipeline:
        found = {}
        for ticket in read_tickets(pipeline, path):
            batch, trials = choose_batch(pipeline.graphs, ticket.group, limit=limit)
            times = {str(trial.batch): trial.picture_ms for trial in trials}
            found[ticket.group.schedule.name] = {"chosen": batch, **times}
    return found


def first_picture_s(bundle: Path, work: Path, *, rounds: int) -> dict[str, float]:
    """From the start of a process to its first row: cold, with filled caches, and a given batch.

    Cold, the bundle is hashed and the prompt encoded; warm, both are known. Medians.
    """
    path = write_jobs(work / "first.jsonl", 16, ["b10"], prompts=16)
    times: dict[str, list[float]] = {"cold": [], "warm": [], "warm, batch given": []}
    for number, (name, found) in itertools.product(range(rounds), times.items()):
        cache = work / f"cache-{number}"
        options = ["--cache", cache / "prompts", *(["--batch", 1] if "given" in name else [])]
        output = work / f"first-{number}-{len(options)}-{name == 'cold'}"
        start = time.perf_counter()
        process = started(bundle, path, output, *options, cache=cache)
        wait_for_rows(process, output, 1)
        found.append(time.perf_counter() - start)
        finished(process)
    return {name: statistics.median(values) for name, values in times.items()}


def _plain_loop(pipeline: Pipeline, tickets: Sequence[Ticket], output: Path) -> float:
    """Seconds of rendering and saving one after the other."""
    output.mkdir()
    start = time.perf_counter()
    for ticket in tickets:
        name = ticket.group.schedule.name
        (made,) = pipeline.render([ticket.job.prompt], seed=ticket.seed, schedule=name)
        made.save(output / f"{ticket.job.id}.png")
    return time.perf_counter() - start


def _run(
    pipeline: Pipeline,
    tickets: Sequence[Ticket],
    output: Path,
    workers: int,
    batch: int | None = None,
) -> tuple[float, Snapshot]:
    """Seconds of a whole run, with all that it prepares, and its last snapshot."""
    options = run_options(output, batch=batch, workers=workers)
    start = time.perf_counter()
    snapshot = Run(pipeline, tickets, Settings(), options).run(threading.Event())
    return time.perf_counter() - start, snapshot


def _denoise(workers: Sequence[Denoise], batches: Sequence[Encoded]) -> float:
    """Seconds of denoising alone, by a thread for each of `workers`."""
    waiting: queue.SimpleQueue[Encoded] = queue.SimpleQueue()
    for batch in batches:
        waiting.put(batch)

    def work(denoise: Denoise) -> None:
        while True:
            try:
                batch = waiting.get_nowait()
            except queue.Empty:
                return
            denoise(batch)

    threads = [threading.Thread(target=work, args=(denoise,)) for denoise in workers]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def _busy(snapshots: Sequence[Snapshot]) -> dict[str, float]:
    """Medians of the shares of time in which the stages' threads worked."""
    return {
        stage: float(np.median([snapshot.busy[stage] for snapshot in snapshots]))
        for stage in snapshots[0].busy
    }


def _differing(plain: Path, run: Path) -> int:
    """Pictures whose pixels are not the same; a run's files say their jobs' ids too."""
    ones, others = pictures_in(plain), pictures_in(run)
    assert set(ones) == set(others)
    return sum(ones[name].pixels != others[name].pixels for name in ones)
