"""How well latency is foretold, and what a renderer does under more load than it can take.

    .venv/bin/python -m scripts.production.latency BUNDLE --jobs 100

Prints tables on stderr and one JSON document on stdout. All numbers are of one run; the bundle is
copied, and schedules of 6, 10 and 25 evaluations are added to the copy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from meancache_trt.bundle import Bundle
from meancache_trt.errors import RefusedError
from meancache_trt.meancache.schedule import bake
from meancache_trt.production.jobs import Job
from meancache_trt.production.outcomes import Outcome
from meancache_trt.production.renderer import Renderer, RendererOptions
from meancache_trt.production.tickets import Defaults
from meancache_trt.render import Pipeline
from meancache_trt.rendering import Rendering

BUDGETS = (6, 10, 25)
STEPS = 50
FACTORS = (0.5, 0.8, 1.5)
"""Of the rate at which the renderer makes pictures when there is always one waiting."""

DEADLINE_FACTOR = 5.0
"""Deadlines are so many times what a job takes alone."""


@dataclass(frozen=True)
class Prediction:
    """Jobs of one budget, one at a time: medians of the wall time and of what was foretold.

    `at_start_ms` was foretold before the first job, from warming up alone; `ratio` is measured
    over predicted, `spread` the 10th and 90th percentile of that job by job.
    """

    budget: int
    jobs: int
    at_start_ms: float
    predicted_ms: float
    measured_ms: float
    ratio: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Load:
    """A Poisson load of `factor` times the capacity; latencies in ms are of rendered jobs.

    `lost` are jobs without exactly one outcome.
    """

    factor: float
    jobs: int
    deadline_ms: float
    done: int
    late: int
    refused: int
    expired: int
    failed: int
    lost: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


@contextmanager
def with_budgets(bundle: Path, budgets: Sequence[int] = BUDGETS) -> Iterator[Path]:
    """A copy of a bundle that has a schedule `b…` of each budget, evenly spread over the grid."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / bundle.name
        shutil.copytree(bundle, copy, copy_function=_link, symlinks=True)
        opened = Bundle.open(copy)
        with Pipeline(opened, threads=1) as pipeline:
            grid = pipeline.grid(STEPS)
        for budget in budgets:
            nodes = [STEPS * node // budget for node in range(budget)]
            opened.add_schedule(bake("euler", grid, nodes, name=f"b{budget}"))
        yield copy


def predictions(
    pipeline: Pipeline, *, budgets: Sequence[int] = BUDGETS, jobs: int = 15
) -> list[Prediction]:
    """Jobs one at a time, budget after budget in turn, so that all see the same machine."""
    warm = tuple(_job(budget, 0) for budget in budgets)
    foretold: dict[int, list[float]] = {budget: [] for budget in budgets}
    measured: dict[int, list[float]] = {budget: [] for budget in budgets}
    with Renderer(pipeline, options=RendererOptions(warm=warm)) as renderer:
        at_start = {budget: renderer.predict_ms(_job(budget, 0)) for budget in budgets}
        for number in range(1, jobs + 1):
            for budget in budgets:
                job = _job(budget, number)
                foretold[budget].append(renderer.predict_ms(job))
                start = time.perf_counter()
                renderer.submit(job).result()
                measured[budget].append(1e3 * (time.perf_counter() - start))
    return [
        _prediction(budget, at_start[budget], foretold[budget], measured[budget])
        for budget in budgets
    ]


def under_load(
    pipeline: Pipeline,
    factor: float,
    *,
    jobs: int = 100,
    budget: int = 10,
    deadline_factor: float = DEADLINE_FACTOR,
    seed: int = 0,
) -> Load:
    """Jobs that arrive at random, `factor` times as many as could be rendered, with deadlines."""
    outcomes: list[Outcome] = []
    with Renderer(
        pipeline, defaults=Defaults(schedule=f"b{budget}"), on_outcome=outcomes.append
    ) as renderer:
        gap_s = _gap_s(renderer, budget)
        outcomes.clear()
        deadline_s = deadline_factor * renderer.predict_ms(_job(budget, 0)) / 1e3
        gaps = np.random.default_rng(seed).exponential(gap_s / factor, jobs)
        futures = _submitted(renderer, budget, gaps, deadline_s)
    return _load(factor, jobs, 1e3 * deadline_s, futures, outcomes)


def _submitted(
    renderer: Renderer, budget: int, gaps: Sequence[float], deadline_s: float
) -> list[Future[Rendering]]:
    """Futures of the jobs that were taken on."""
    futures = []
    due = time.monotonic()
    for number, gap_s in enumerate(gaps, start=1000):
        due += gap_s
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            futures.append(renderer.submit(_job(budget, number), deadline_s=deadline_s))
        except RefusedError:
            continue
    return futures


def _gap_s(renderer: Renderer, budget: int, jobs: int = 12) -> float:
    """How far apart pictures come when there is always a job waiting."""
    start = time.perf_counter()
    for future in [renderer.submit(_job(budget, 100 + number)) for number in range(jobs)]:
        future.result()
    return (time.perf_counter() - start) / jobs


def _load(
    factor: float,
    jobs: int,
    deadline_ms: float,
    futures: Sequence[Future[Rendering]],
    outcomes: Sequence[Outcome],
) -> Load:
    kinds = Counter(outcome.kind for outcome in outcomes)
    rendered = [found.latency_ms for found in outcomes if found.kind in ("done", "late")]
    unresolved = sum(not future.done() for future in futures)
    p50, p95, p99 = np.percentile(rendered, [50, 95, 99]) if rendered else (0.0, 0.0, 0.0)
    return Load(
        factor=factor,
        jobs=jobs,
        deadline_ms=deadline_ms,
        done=kinds["done"],
        late=kinds["late"],
        refused=kinds["refused"],
        expired=kinds["expired"],
        failed=kinds["failed"],
        lost=unresolved + abs(jobs - len(outcomes)),
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
    )


def _prediction(
    budget: int, at_start_ms: float, foretold: Sequence[float], measured: Sequence[float]
) -> Prediction:
    each = [wall / told for wall, told in zip(measured, foretold, strict=True)]
    low, high = np.percentile(each, [10, 90])
    return Prediction(
        budget=budget,
        jobs=len(each),
        at_start_ms=at_start_ms,
        predicted_ms=statistics.median(foretold),
        measured_ms=statistics.median(measured),
        ratio=statistics.median(each),
        spread=(float(low), float(high)),
    )


def _job(budget: int, number: int) -> Job:
    """A job whose prompt no cache holds: the process's number is in it."""
    prompt = f"large plain red circle left gray {os.getpid()} {number} {budget}"
    return Job(id=f"job-{number}", prompt=prompt, seed=number, schedule=f"b{budget}")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _print_tables(found: Sequence[Prediction], loads: Sequence[Load]) -> None:
    print(
        f"{'B':>4} {'at start':>9} {'predicted':>10} {'measured':>9} {'ratio':>6}", file=sys.stderr
    )
    for row in found:
        print(
            f"{row.budget:4} {row.at_start_ms:9.1f} {row.predicted_ms:10.1f} "
            f"{row.measured_ms:9.1f} {row.ratio:6.3f}",
            file=sys.stderr,
        )
    names = ("done", "late", "refused", "expired", "failed", "lost", "p50_ms", "p95_ms", "p99_ms")
    print("load " + " ".join(f"{name:>8}" for name in names), file=sys.stderr)
    for load in loads:
        cells = " ".join(f"{getattr(load, name):8.0f}" for name in names)
        print(f"{load.factor:4.1f} {cells}", file=sys.stderr)


def main() -> None:
    """Run both measurements on a bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--jobs", type=int, default=100, help="of each load")
    parser.add_argument("--rounds", type=int, default=25, help="jobs of each budget, one at a time")
    parser.add_argument("--threads", type=int, default=0, help="cores of a graph; 0 means all")
    options = parser.parse_args()
    with (
        with_budgets(options.bundle) as bundle,
        Pipeline(Bundle.open(bundle), threads=options.threads, embedding_cache="off") as pipeline,
    ):
        found = predictions(pipeline, jobs=options.rounds)
        loads = [under_load(pipeline, factor, jobs=options.jobs) for factor in FACTORS]
    _print_tables(found, loads)
    print(
        json.dumps(
            {
                "predictions": [asdict(row) for row in found],
                "loads": [asdict(row) for row in loads],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
