"""What a run came to, as tables or JSON: at its end, and for `inspect` of its directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from meancache_trt.cli.output import note, print_json, print_table
from meancache_trt.production.job_files import Line
from meancache_trt.production.snapshot import Snapshot
from meancache_trt.production.summary import Summary

_LISTED = 100
"""Failed jobs and bad lines in a JSON document; the log has all."""

_SHOWN = 5
"""Failed jobs that are told on a terminal."""


def print_run(
    snapshot: Snapshot, summary: Summary, faults: Sequence[Line], log: Path, *, as_json: bool
) -> None:
    """Print a run that has ended, or was stopped."""
    if as_json:
        print_json(
            {
                "jobs": snapshot.jobs,
                "left": snapshot.left,
                "here": snapshot.done,
                "earlier": snapshot.earlier,
                "others": snapshot.others,
                "is_stopped": snapshot.is_stopped,
                "seconds": round(snapshot.elapsed_s, 3),
                "pictures_per_s": round(snapshot.pictures_per_s, 3),
                "busy": {name: round(share, 3) for name, share in snapshot.busy.items()},
                "bad_lines": len(faults),
                "first_bad_lines": [
                    {"line": fault.number, "fault": fault.fault} for fault in faults[:_LISTED]
                ],
                **_facts(summary, log),
            }
        )
        return
    rows: list[tuple[str, object]] = [
        ("jobs", snapshot.jobs),
        ("done", summary.done),
        ("failed", summary.failed),
        ("left", snapshot.left),
        ("done here", snapshot.done),
        ("finished earlier", snapshot.earlier),
        ("by other processes", snapshot.others),
        ("bad lines skipped", len(faults)),
        ("seconds", f"{snapshot.elapsed_s:.1f}"),
        ("pictures/s here", f"{snapshot.pictures_per_s:.2f}"),
    ]
    always = {"jobs", "done", "failed", "seconds", "pictures/s here"}
    print_table(["run", ""], [row for row in rows if row[0] in always or row[1]])
    if snapshot.busy and (snapshot.done or snapshot.failed):  # the actors of --ray keep theirs
        click.echo()
        busy = [(name, f"{share:.0%}") for name, share in snapshot.busy.items()]
        print_table(["stage", "busy"], busy)
    _print_warnings(summary)
    note(f"results: {log}")


def print_log(summary: Summary, log: Path, *, as_json: bool) -> None:
    """Print what a results log holds."""
    if as_json:
        print_json(_facts(summary, log))
        return
    click.echo(f"results   {log}")
    click.echo(f"jobs      {summary.done} done, {summary.failed} failed")
    if summary.first is not None:
        click.echo(f"finished  {summary.first} to {summary.last}")
    if summary.schedules:
        click.echo()
        print_table(["schedule", "jobs"], list(summary.schedules.items()))
    _print_warnings(summary)


def _print_warnings(summary: Summary) -> None:
    if summary.warnings:
        click.echo()
        print_table(["warning", "jobs"], list(summary.warnings.items()))
    if summary.failures:
        click.echo()
        for name, error in list(summary.failures.items())[:_SHOWN]:
            click.echo(f"failed {name}: {error}")
        if summary.failed > _SHOWN:
            click.echo(f"and {summary.failed - _SHOWN:,} more")


def _facts(summary: Summary, log: Path) -> dict[str, object]:
    failures = list(summary.failures.items())[:_LISTED]
    return {
        "results": str(log),
        "done": summary.done,
        "failed": summary.failed,
        "failures": [{"id": name, "error": error} for name, error in failures],
        "schedules": summary.schedules,
        "warnings": summary.warnings,
        "first_finished_at": summary.first,
        "last_finished_at": summary.last,
    }
