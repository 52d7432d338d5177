"""`render --prompts`: a run over a job file."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import click
import msgspec
from rich.console import Console

from meancache_trt.cli import options
from meancache_trt.cli.output import note
from meancache_trt.cli.picture_options import Opening
from meancache_trt.cli.planning import Mebibytes
from meancache_trt.cli.run_report import print_run
from meancache_trt.cli.signals import INTERRUPTED, Caught, stopping
from meancache_trt.errors import MeanCacheError, RenderError
from meancache_trt.media.formats import OutputFormat, check_formats, default_formats
from meancache_trt.production.batch_sizes import DEFAULT_LIMIT
from meancache_trt.production.job_files import Line, read_jobs
from meancache_trt.production.jobs import Limits
from meancache_trt.production.limits import MIN_FREE_BYTES, Guard
from meancache_trt.production.metrics import MetricsTarget
from meancache_trt.production.names import NameTemplate
from meancache_trt.production.ray_cluster import Cluster
from meancache_trt.production.ray_data import RayRun
from meancache_trt.production.results import LOG
from meancache_trt.production.run import Run, RunOptions
from meancache_trt.production.summary import Summary, summarize
from meancache_trt.production.tickets import Checker, Defaults, Settings, Ticket, check_all
from meancache_trt.production.watch import View, live_view, plain_lines, watching

_FAULTS_SHOWN = 20
_NUMBERED = "{index:04d}-{slug}"
_BY_ID = "{id}"
_LOCAL_RAY = "local"


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Options of a run over a job file; what was not given is None or False.

    Raises a usage error for options that contradict each other.
    """

    target_psnr: float | None
    percentile: float | None
    name: NameTemplate | None
    batch: int | None
    max_batch: int | None
    workers: int | None
    skip_bad: bool
    max_failures: int | None
    retry_failed: bool
    timeout: float | None
    memory_cap: int | None
    min_free: int | None
    metrics: MetricsTarget | None
    any_version: bool
    ray: str | None
    actors: int | None

    def __post_init__(self) -> None:
        if self.percentile is not None and self.target_psnr is None:
            raise click.UsageError("--percentile is that of --target-psnr")
        if self.batch is not None and self.max_batch is not None:
            raise click.UsageError("give --batch or --max-batch, but not both")
        if self.actors is not None and self.ray is None:
            raise click.UsageError("--actors are those of --ray")

    def check_unused(self) -> None:
        """A usage error where any was given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"only a run over a job file takes {names}; give --prompts FILE")

    def cores(self, threads: int) -> tuple[int, int]:
        """Workers, and threads of each one's graphs, that share the cores of this process."""
        cores = len(os.sched_getaffinity(0))
        workers = self.workers or max(1, cores // (threads or 1))
        return workers, threads or max(1, cores // workers)

    def run_options(
        self, output: Path, formats: tuple[OutputFormat, ...], names: NameTemplate, workers: int
    ) -> RunOptions:
        """What a run takes of these."""
        return RunOptions(
            output=output,
            formats=formats,
            names=names,
            guard=Guard(output, self.min_free or MIN_FREE_BYTES, self.memory_cap),
            workers=workers,
            batch=self.batch,
            batch_limit=self.max_batch or DEFAULT_LIMIT,
            max_failures=self.max_failures,
            timeout_s=self.timeout,
            is_failed_retried=self.retry_failed,
            is_any_version_allowed=self.any_version,
        )


options_of_run = options.gathered(
    "batching",
    Batching,
    click.option(
        "--target-psnr",
        type=float,
        metavar="DB",
        help="Instead of --schedule: the bundle's smallest schedule that kept as much of its "
        "samples, on average or of 95 in 100 with --percentile 5.",
    ),
    click.option(
        "--percentile",
        type=float,
        metavar="5",
        help="With --target-psnr: 5, the only one that schedules have on record.",
    ),
    click.option(
        "--name",
        type=options.Parsed("template", NameTemplate),
        metavar="TEMPLATE",
        help="Names of files, of the fields id, index, slug, seed, schedule, width and height, "
        f"such as {{schedule}}/{{id}}. By default {_BY_ID}; {_NUMBERED} for a text file.",
    ),
    click.option(
        "--batch",
        type=click.IntRange(min=1),
        metavar="N",
        help="Pictures at a time; by default what a short measurement finds best.",
    ),
    click.option(
        "--max-batch",
        type=click.IntRange(min=1),
        metavar="N",
        help=f"How many of them are tried at most; by default {DEFAULT_LIMIT}.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="Batches that are denoised side by side; by default as many as there are cores for "
        "their --threads (1 each), and 1 on a GPU.",
    ),
    click.option("--skip-bad", is_flag=True, help="Render the others where lines are no jobs."),
    click.option(
        "--max-failures",
        type=click.IntRange(min=0),
        metavar="N",
        help="Stop when more jobs than this have failed; by default none is too many.",
    ),
    click.option(
        "--retry-failed", is_flag=True, help="Try jobs again that failed in an earlier run."
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="A batch whose loop takes longer has failed.",
    ),
    click.option(
        "--memory-cap",
        type=Mebibytes(),
        metavar="MIB",
        help="Stop when this process holds more, in MiB or such as 4G.",
    ),
    click.option(
        "--min-free",
        type=Mebibytes(),
        metavar="MIB",
        help="Stop when less is free on the disk, in MiB or such as 4G; by default "
        f"{MIN_FREE_BYTES >> 20}.",
    ),
    click.option(
        "--metrics",
        type=options.Parsed("target", MetricsTarget),
        metavar="PORT|HOST:PORT|FILE.prom",
        help="Tell Prometheus how far it is: at an endpoint, which is on this machine alone unless "
        "a host is given, or in a file for the textfile collector.",
    ),
    click.option(
        "--any-version",
        is_flag=True,
        help="Go on with a run that another version of the runtime began; pictures may differ in "
        "their last bits.",
    ),
    click.option(
        "--ray",
        is_flag=False,
        flag_value=_LOCAL_RAY,
        metavar="[ADDRESS]",
        help="Render on a Ray cluster, such as auto or HOST:PORT, or without an address on one of "
        "this machine's own. All nodes need the bundle and the output directory at these paths.",
    ),
    click.option(
        "--actors",
        type=click.IntRange(min=1),
        metavar="N",
        help="With --ray: processes; by default one for each GPU, or where there is none as many "
        "as the cores suffice for.",
    ),
)
"""Give a command these options; it gets them as one `Batching` named `batching`."""


def render_jobs(
    bundle: Path,
    file: Path,
    output: Path,
    formats: tuple[OutputFormat, ...],
    defaults: Defaults,
    settings: Settings,
    opening: Opening,
    batching: Batching,
    *,
    as_json: bool,
) -> None:
    """Render what a job file lists and is not done yet. Raises `RenderError` where jobs failed."""
    if batching.target_psnr is not None and defaults.schedule is not None:
        raise click.UsageError("give --schedule or --target-psnr, but not both")
    lines = [_aimed(line, batching) for line in read_jobs(file)]
    names = batching.name or NameTemplate.parse(_BY_ID if _has_ids(file) else _NUMBERED)
    workers, threads = batching.cores(opening.threads)
    stop = threading.Event()
    with (
        stopping(stop, note) as caught,
        opening.open(bundle, threads=threads, keep_encoders=True) as pipeline,
    ):
        checker = Checker(pipeline, settings, defaults, Limits())
        tickets, faults = check_all(lines, checker, skip_bad=batching.skip_bad)
        _tell(faults)
        # On Ray there are actors side by side, each with workers of its own.
        if pipeline.runtime.device != "cpu" or batching.ray is not None:
            workers = batching.workers or 1
        chosen = batching.run_options(output, _formats(formats, tickets), names, workers)
        run = (
            Run(pipeline, tickets, settings, chosen)
            if batching.ray is None
            else RayRun(
                opening.elsewhere(bundle),
                tickets,
                chosen,
                Cluster(None if batching.ray == _LOCAL_RAY else batching.ray, batching.actors),
                settings=settings,
                defaults=defaults,
                limits=Limits(),
            )
        )
        problem: MeanCacheError | None = None
        with watching(run.snapshot, _views(batching.metrics)):
            try:
                run.run(stop)
            except MeanCacheError as error:
                problem = error  # what was done is told first
        snapshot = run.snapshot(is_stopped=stop.is_set())
        summary = summarize(output / LOG, {ticket.job.id for ticket in tickets})
        print_run(snapshot, summary, faults, output / LOG, as_json=as_json)
    if problem is not None:
        raise problem
    _end(summary, snapshot.left, len(tickets), output / LOG, caught)


def _aimed(line: Line, batching: Batching) -> Line:
    """A line whose job has the target that was given for those that choose no schedule."""
    job, target = line.job, batching.target_psnr
    if target is None or job is None or (job.schedule, job.target_psnr) != (None, None):
        return line
    aimed = msgspec.structs.replace(job, target_psnr=target, percentile=batching.percentile)
    return Line(line.number, aimed)


def _has_ids(file: Path) -> bool:
    return file.suffix.lower() not in (".txt", "")


def _tell(faults: Sequence[Line]) -> None:
    for fault in faults[:_FAULTS_SHOWN]:
        note(f"skipped {fault}")
    if len(faults) > _FAULTS_SHOWN:
        note(f"skipped {len(faults) - _FAULTS_SHOWN:,} more lines")


def _formats(
    given: tuple[OutputFormat, ...], tickets: Sequence[Ticket]
) -> tuple[OutputFormat, ...]:
    size = tickets[0].group.resolution.size
    formats = given or default_formats(size)
    check_formats(formats, size)
    return formats


def _views(metrics: MetricsTarget | None) -> Iterator[View]:
    console = Console(stderr=True)
    yield live_view(console) if console.is_terminal else plain_lines(note)
    if metrics is not None:
        yield metrics.view(note)


def _end(summary: Summary, left: int, jobs: int, log: Path, caught: Caught) -> None:
    """Say what there is to be done, and end with the status for that."""
    if left and caught.signal is not None:
        note(f"stopped with {left} of {jobs} jobs left; run the same command to go on")
        if caught.signal == signal.SIGINT:
            raise SystemExit(INTERRUPTED)
        return
    if summary.failed:
        raise RenderError(
            f"{summary.failed} of {jobs} jobs failed; {log} says why. --retry-failed tries them "
            "again"
        )
