"""One process of a run, which may be killed: reads a job list and renders what is undone.

usage: runner.py BUNDLE JOBS OUTPUT [options]

Prints the last snapshot as JSON; an error is one message on stderr and exit status 1.
"""

from __future__ import annotations

import argparse
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from meancache_trt.errors import MeanCacheError
from meancache_trt.media.formats import OutputFormat
from meancache_trt.production.job_files import read_jobs
from meancache_trt.production.jobs import Limits
from meancache_trt.production.limits import Guard
from meancache_trt.production.names import NameTemplate
from meancache_trt.production.run import Run, RunOptions
from meancache_trt.production.tickets import Checker, Defaults, Settings, Ticket, check_all
from meancache_trt.render import Pipeline, load


def main() -> None:
    """Run until all is done, or SIGTERM."""
    options = _parser().parse_args()
    stop = threading.Event()
    _set_by_sigterm(stop)
    try:
        with load(options.bundle, threads=1, embedding_cache=options.cache) as pipeline:
            tickets = read_tickets(pipeline, options.jobs)
            chosen = run_options(
                options.output,
                batch=options.batch,
                workers=options.workers,
                min_free_bytes=options.min_free_bytes,
            )
            snapshot = Run(pipeline, tickets, Settings(), chosen).run(stop)
    except MeanCacheError as error:
        sys.exit(f"error: {error}")
    print(msgspec.json.encode(snapshot).decode())


def read_tickets(pipeline: Pipeline, jobs: Path) -> Sequence[Ticket]:
    """The jobs of a file, all of which have to be sound."""
    checker = Checker(pipeline, Settings(), Defaults(), Limits())
    return check_all(read_jobs(jobs), checker, skip_bad=False)[0]


def run_options(
    output: Path, *, batch: int | None = None, workers: int = 2, min_free_bytes: int = 0
) -> RunOptions:
    """PNG files named after their jobs."""
    return RunOptions(
        output,
        formats=(OutputFormat("png"),),
        names=NameTemplate.parse("{id}"),
        guard=Guard(output, min_free_bytes),
        workers=workers,
        batch=batch,
    )


def _set_by_sigterm(stop: threading.Event) -> None:
    """By way of a thread: a handler that interrupts the event's own code would wait for ever."""
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    signal.signal(signal.SIGTERM, lambda number, _: arrived.put(number))

    def wait() -> None:
        arrived.get()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bundle", "jobs", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", default="off", help="directory of encoded prompts")
    parser.add_argument("--min-free-bytes", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
