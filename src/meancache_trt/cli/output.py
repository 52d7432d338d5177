"""What the commands print: results on standard output, progress and messages on standard error."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from meancache_trt.meancache.schedule import Schedule

Report = Callable[[int, int], None]
"""(done, total)."""

_PLAIN_WIDTH = 400
"""Columns where standard output is no terminal: nothing is folded in a file or a pipe."""

_PLAIN_LINE_S = 10.0
"""Seconds between progress lines where standard error is no terminal."""


def hush_libraries() -> None:
    """Turn off the progress bars that diffusers and transformers show while they load."""
    with contextlib.suppress(ImportError):  # who needs them says so better
        import diffusers.utils.logging  # noqa: PLC0415  (heavy; only where it is used anyway)
        import transformers.utils.logging  # noqa: PLC0415

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def note(message: str) -> None:
    """Say what is happening, on standard error."""
    click.echo(message, err=True)


def print_json(value: object) -> None:
    """Print one JSON document on standard output."""
    click.echo(json.dumps(msgspec.to_builtins(value), ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print a table whose first column is text and whose other columns are numbers."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # no markup: [cpu] is to be seen
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    console.print(table)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Report]:
    """A bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(what)
        return
    columns: Any = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def transient_progress(what: str) -> Iterator[Report]:
    """The share of one of many works: a bar that leaves the terminal with it, or a line now and
    then. Whoever does the work says that it is done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(what, is_end_said=False)
        return
    columns: Any = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(what: str, *, is_end_said: bool = True) -> Report:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if (done == total and is_end_said) or time.monotonic() - last >= _PLAIN_LINE_S:
            last = time.monotonic()
            note(f"{what}: {done}/{total}")

    return report


def decibels(value: float | None) -> str:
    """A PSNR for people; a dash where there is none."""
    return "—" if value is None else f"{value:.2f}"


def show_schedule(schedule: Schedule) -> None:
    """Print a schedule as a table of its rows."""
    click.echo(
        f"schedule {schedule.name}: {schedule.method}, {schedule.budget} of "
        f"{schedule.grid.describe()}, history {schedule.history}"
    )
    if schedule.guidance_scale is not None:
        click.echo(f"guidance scale {schedule.guidance_scale}")
    if schedule.model is not None:
        click.echo(f"model {schedule.model.name}")
    if schedule.calibration is not None:
        click.echo(f"calibrated in {schedule.precision}")
    second = schedule.grid.second_stage
    if second is not None:
        click.echo(f"transformer_2 {second}")
    click.echo()
    columns: list[tuple[str, Sequence[object]]] = [
        ("node", schedule.nodes),
        ("sigma", [f"{sigma:.6f}" for sigma in schedule.sigmas()[:-1]]),
        *([("network", schedule.transformers())] if second is not None else []),
        ("span", [*(schedule.spans or ()), *[""] * schedule.budget][: schedule.budget]),
        (
            "weights of v_n, v_n-1, …",
            ["  ".join(f"{weight:+.6f}" for weight in weights) for weights in schedule.weights],
        ),
    ]
    rows = list(zip(*(values for _, values in columns), strict=True))
    print_table([name for name, _ in columns], rows)
