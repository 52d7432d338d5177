"""A run in one process: stops, failures and other holders; those that are killed have a proof."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from scripts.production.outcome import Picture, pictures_in, rows_of, temporary_files
from scripts.production.runner import run_options

from meancache_trt.errors import InputError, RenderError
from meancache_trt.media.formats import OutputFormat
from meancache_trt.production.chunks import chunks_of
from meancache_trt.production.claims import Claims
from meancache_trt.production.jobs import Job, Limits
from meancache_trt.production.limits import Guard
from meancache_trt.production.names import NameTemplate
from meancache_trt.production.results import ResultsLog
from meancache_trt.production.run import Run, RunOptions
from meancache_trt.production.tickets import Checker, Defaults, Settings, Ticket
from meancache_trt.render import Pipeline

JOBS = 12


@pytest.fixture
def tickets(pipeline: Pipeline) -> list[Ticket]:
    checker = Checker(pipeline, Settings(), Defaults(), Limits())
    return [
        checker.check(
            index,
            Job(id=f"j{index}", prompt=f"a circle {index % 5}", seed=index, schedule=schedule),
        )
        for index, schedule in enumerate(["b6", "b6", "b10"] * (JOBS // 3))
    ]


@pytest.fixture
def undisturbed(pipeline: Pipeline, tickets: list[Ticket], tmp_path: Path) -> dict[str, Picture]:
    options = run_options(tmp_path / "undisturbed", batch=2)
    snapshot = Run(pipeline, tickets, Settings(), options).run(threading.Event())
    assert (snapshot.done, snapshot.failed, snapshot.left) == (JOBS, 0, 0)
    return pictures_in(tmp_path / "undisturbed")


class StopAfter(threading.Event):
    """Set once the log in a directory has so many rows: whoever asks looks."""

    def __init__(self, output: Path, rows: int) -> None:
        super().__init__()
        self._output, self._rows = output, rows

    def is_set(self) -> bool:
        if len(rows_of(self._output)) >= self._rows:
            self.set()
        return super().is_set()


def ids_of(output: Path) -> list[str]:
    return sorted(row.id for row in rows_of(output) if row.status == "done")


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_stopped_run_keeps_what_is_done_and_goes_on_with_the_rest(
    rows: int,
    pipeline: Pipeline,
    tickets: list[Ticket],
    undisturbed: dict[str, Picture],
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    options = run_options(output, batch=2, workers=1)
    first = Run(pipeline, tickets, Settings(), options).run(StopAfter(output, rows))
    assert first.is_stopped
    assert rows <= first.done == len(ids_of(output)) == len(list(output.glob("*.png")))
    second = Run(pipeline, tickets, Settings(), options).run(threading.Event())
    assert (second.earlier, second.done, second.left) == (first.done, JOBS - first.done, 0)
    assert ids_of(output) == sorted(ticket.job.id for ticket in tickets)
    assert pictures_in(output) == undisturbed
    assert temporary_files(output) == []


def test_a_chunk_that_nobody_holds_is_done_or_not_begun(
    pipeline: Pipeline, tickets: list[Ticket], undisturbed: dict[str, Picture], tmp_path: Path
) -> None:
    """Others take claims all the time; a half done chunk among them would be rendered twice."""
    output, ended, halves = tmp_path / "out", threading.Event(), []
    options = run_options(output, batch=2, workers=2)
    run = Run(pipeline, tickets, Settings(), options)
    chunks = chunks_of(tickets, lambda _: 2, lambda _: 1)
    claims, log, chance = Claims(output), ResultsLog(output), random.Random(0)

    def meddle() -> None:
        while not ended.is_set():
            chunk = chance.choice(chunks)
            if claim := claims.try_claim(chunk.name):
                with claim:
                    log.refresh()
                    known = {log.status_of(ticket) for ticket in chunk.tickets}
                    if len(known) > 1:
                        halves.append(chunk.name)
                ended.wait(0.001)

    meddler = threading.Thread(target=meddle)
    meddler.start()
    try:
        snapshot = run.run(threading.Event())
    finally:
        ended.set()
        meddler.join()
    assert halves == []
    assert (snapshot.done, snapshot.others) == (JOBS, 0)
    assert pictures_in(output) == undisturbed


def test_two_runs_at_once_share_the_jobs(
    pipeline: Pipeline, tickets: list[Ticket], undisturbed: dict[str, Picture], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = run_options(output, batch=2, workers=1)
    runs = [Run(pipeline, tickets, Settings(), options) for _ in range(2)]
    threads = [threading.Thread(target=run.run, args=(threading.Event(),)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(run.snapshot().done for run in runs) == JOBS
    assert [run.snapshot().left for run in runs] == [0, 0]
    assert ids_of(output) == sorted(ticket.job.id for ticket in tickets)
    assert pictures_in(output) == undisturbed


@pytest.fixture
def unfit(tickets: list[Ticket], pipeline: Pipeline) -> list[Ticket]:
    """Four jobs, the second of which no JPEG has room for."""
    checker = Checker(
        pipeline, Settings(), Defaults(schedule="b6"), Limits(prompt_characters=10**6)
    )
    return [
        checker.check(index, Job(id=f"j{index}", prompt="red " * (20_000 if index == 1 else 1)))
        for index in range(4)
    ]


def jpeg_options(output: Path) -> RunOptions:
    return replace(
        run_options(output, batch=2), formats=(OutputFormat("png"), OutputFormat("jpeg"))
    )


def test_a_job_that_fails_is_recorded_and_the_rest_goes_on(
    pipeline: Pipeline, unfit: list[Ticket], tmp_path: Path
) -> None:
    options = jpeg_options(tmp_path / "out")
    snapshot = Run(pipeline, unfit, Settings(), options).run(threading.Event())
    assert (snapshot.done, snapshot.failed, snapshot.left) == (3, 1, 0)
    (failed,) = [row for row in rows_of(options.output) if row.status == "failed"]
    assert failed.id == "j1"
    assert failed.error is not None
    assert "EXIF holds 65533 bytes" in failed.error
    assert not failed.files
    assert not (options.output / "j1.png").exists()
    again = Run(pipeline, unfit, Settings(), options).run(threading.Event())
    assert (again.earlier, again.done, again.failed) == (4, 0, 0)


def test_a_job_that_fails_again_counts_towards_the_failures_allowed(
    pipeline: Pipeline, unfit: list[Ticket], tmp_path: Path
) -> None:
    options = replace(jpeg_options(tmp_path / "out"), max_failures=1)
    Run(pipeline, unfit, Settings(), options).run(threading.Event())
    retried = replace(options, is_failed_retried=True, max_failures=0)
    with pytest.raises(RenderError, match="1 jobs have failed, 0 are allowed"):
        Run(pipeline, unfit, Settings(), retried).run(threading.Event())
    assert [row.status for row in rows_of(options.output) if row.id == "j1"] == ["failed"] * 2


def test_a_limit_of_the_guard_ends_a_run_before_its_first_picture(
    pipeline: Pipeline, tickets: list[Ticket], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = replace(run_options(output, batch=2), guard=Guard(output, min_free_bytes=1 << 60))
    with pytest.raises(InputError, match="are to stay free; make room"):
        Run(pipeline, tickets, Settings(), options).run(threading.Event())
    assert rows_of(output) == []
    assert list(output.glob("*.png")) == []
    assert list((output / ".meancache").glob("tmp-*")) == []


def test_a_job_does_not_replace_the_file_of_another_that_is_done(
    pipeline: Pipeline, tickets: list[Ticket], tmp_path: Path
) -> None:
    """As where a line was put before others: names with the index shift, those done do not."""
    names = NameTemplate.parse("{index:04d}")
    options = replace(run_options(tmp_path / "out", batch=2), names=names)
    Run(pipeline, tickets[:2], Settings(), options).run(threading.Event())
    done = pictures_in(tmp_path / "out")
    shifted = [replace(tickets[2], index=0), *(replace(t, index=t.index + 1) for t in tickets[:2])]
    with pytest.raises(InputError, match=r"'j2' would be written to 0000\.png.*of job 'j0'"):
        Run(pipeline, shifted, Settings(), options)
    assert pictures_in(tmp_path / "out") == done
