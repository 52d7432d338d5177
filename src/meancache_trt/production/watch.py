"""Sight of a run while it goes on: a live view on a terminal, a line now and then elsewhere.

A thread takes a snapshot of the run twice a second and shows it to every view.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from meancache_trt.production.snapshot import Snapshot

POLL_S = 0.5
"""Often enough to look alive; a snapshot takes microseconds."""

WINDOW_S = 60.0
"""What "recent" means for a pace, where that many seconds hold `_LEAST_CHANGES`."""

_LEAST_CHANGES = 8
"""Jobs come in batches: over fewer of those a pace jumps. Long videos reach back further."""

_PLAIN_LINE_S = 10.0
_BAR_WIDTH = 40


@dataclass(frozen=True)
class Sight:
    """A snapshot and the recent pace.

    `pictures_per_s` is of this process; `left_s` is until all processes have finished all jobs,
    None while nothing was finished yet.
    """

    snapshot: Snapshot
    pictures_per_s: float
    left_s: float | None


Show = Callable[[Sight], None]
View = AbstractContextManager[Show]


class Pace:
    """Makes sights of the snapshots of one run, taken in order."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._changes: deque[Snapshot] = deque()

    def look(self, snapshot: Snapshot) -> Sight:
        """The sight of the next snapshot."""
        changes = self._changes
        if not changes or snapshot.left != changes[-1].left:
            changes.append(snapshot)
        while (
            len(changes) > _LEAST_CHANGES
            and snapshot.elapsed_s - changes[1].elapsed_s >= self._window_s
        ):
            changes.popleft()
        past = changes[0]
        span_s = snapshot.elapsed_s - past.elapsed_s
        finished = past.left - snapshot.left
        return Sight(
            snapshot,
            (snapshot.done - past.done) / span_s if span_s else 0.0,
            snapshot.left * span_s / finished if finished else None,
        )


@contextlib.contextmanager
def watching(look: Callable[[], Snapshot], views: Iterable[View]) -> Iterator[None]:
    """Show what `look` gives to views, until the end of the block, and once more then.

    Raises what a view does with the first sight, before the block begins.
    """
    with contextlib.ExitStack() as stack:
        shows = [stack.enter_context(view) for view in views]
        pace, is_over = Pace(), threading.Event()

        def show() -> None:
            sight = pace.look(look())
            for each in shows:
                each(sight)

        def poll() -> None:
            while not is_over.wait(POLL_S):
                show()

        show()
        thread = threading.Thread(target=poll, name="watch")
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            show()


@contextlib.contextmanager
def live_view(console: Console) -> Iterator[Show]:
    """A view of several lines on a terminal, which leaves it again at the end."""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda sight: live.update(_picture(sight), refresh=True)


@contextlib.contextmanager
def plain_lines(write: Callable[[str], None], every_s: float = _PLAIN_LINE_S) -> Iterator[Show]:
    """A line every `every_s` seconds, and one at the end."""
    latest: Sight | None = None
    last = time.monotonic()

    def show(sight: Sight) -> None:
        nonlocal latest, last
        latest = sight
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            write(describe(sight))

    yield show
    if latest is not None:
        write(describe(latest))


def describe(sight: Sight) -> str:
    """A sight on one line."""
    found = sight.snapshot
    parts = [f"{found.jobs - found.left}/{found.jobs} jobs", _speed(sight)]
    parts += [f"{found.failed} failed"] if found.failed else []
    parts += [f"{found.others} by other processes"] if found.others else []
    busy = ", ".join(f"{name} {share:.0%}" for name, share in found.busy.items())
    return ", ".join(parts) + (f"; busy: {busy}" if busy else "")


def _speed(sight: Sight) -> str:
    left = "" if not sight.left_s else f", {duration(sight.left_s)} left"
    return f"{sight.pictures_per_s:.2f} pictures/s{left}"


def duration(seconds: float) -> str:
    """Seconds as people read them, such as 42 s, 3 min 05 s or 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _picture(sight: Sight) -> RenderableType:
    found = sight.snapshot
    finished = found.jobs - found.left
    jobs = Table.grid(padding=(0, 2))
    jobs.add_row(
        "jobs",
        ProgressBar(total=found.jobs, completed=finished, width=_BAR_WIDTH),
        f"{finished}/{found.jobs}",
        _speed(sight),
    )
    counts = Text(
        f"{found.done} done here, {found.failed} failed, {found.others} by other processes, "
        f"{found.earlier} earlier"
    )
    stages = Table.grid(padding=(0, 2))
    for name, share in found.busy.items():
        bar = ProgressBar(total=1.0, completed=min(share, 1.0), width=_BAR_WIDTH // 2)
        stages.add_row(name, bar, f"{share:4.0%} busy", f"{found.waiting[name]} waiting")
    return Group(jobs, counts, stages)
