from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from meancache_trt.errors import InputError
from meancache_trt.production.snapshot import Snapshot
from meancache_trt.production.stages import Conveyor, Stage
from meancache_trt.production.watch import (
    Pace,
    Sight,
    describe,
    duration,
    live_view,
    plain_lines,
    watching,
)


def at(elapsed_s: float, done: int, *, jobs: int = 100, others: int = 0, failed: int = 0):
    return Snapshot(
        jobs=jobs, earlier=0, done=done, failed=failed, others=others, elapsed_s=elapsed_s
    )


def looked(*snapshots: Snapshot, window_s: float = 60.0) -> Sight:
    pace = Pace(window_s)
    return [pace.look(snapshot) for snapshot in snapshots][-1]


def test_nothing_is_known_before_something_is_done():
    assert looked(at(0, 0), at(30, 0)) == Sight(at(30, 0), 0.0, None)


def test_a_steady_run_has_its_pace_and_end():
    sight = looked(*(at(second, 2 * second) for second in range(31)))
    assert (sight.pictures_per_s, sight.left_s) == (2.0, 20.0)


def test_all_processes_bring_the_end_nearer_and_one_has_the_pace():
    sight = looked(*(at(t, t, others=2 * t, failed=t) for t in range(21)))
    assert (sight.pictures_per_s, sight.left_s) == (1.0, 5.0)


def test_an_old_pace_is_forgotten():
    slow = [at(second, second, jobs=2000) for second in range(101)]
    fast = [at(100 + second, 100 + 10 * second, jobs=2000) for second in range(1, 101)]
    assert looked(*slow, *fast, window_s=60.0).pictures_per_s == 10.0
    assert 5 < looked(*slow, *fast, window_s=1000.0).pictures_per_s < 6


def test_a_pace_is_over_several_jobs_however_long_they_take():
    hours = [at(3600.0 * hour, hour) for hour in range(4)]
    between = at(3600.0 * 3 + 1800, 3)
    assert looked(*hours, between).pictures_per_s == pytest.approx(3 / (3.5 * 3600))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_a_sight_is_one_line():
    snapshot = Snapshot(
        jobs=500, earlier=10, done=90, failed=3, others=50, elapsed_s=60.0,
        busy={"encode": 0.031, "denoise": 0.98}, waiting={"encode": 0, "denoise": 2},
    )  # fmt: skip
    assert describe(Sight(snapshot, 1.5, 200.0)) == (
        "153/500 jobs, 1.50 pictures/s, 3 min 20 s left, 3 failed, 50 by other processes; "
        "busy: encode 3%, denoise 98%"
    )


def test_plain_lines_come_now_and_then_and_at_the_end():
    lines: list[str] = []
    with plain_lines(lines.append, every_s=1e9) as show:
        for second in range(10):
            show(looked(at(second, second)))
        assert lines == []
    assert len(lines) == 1
    assert lines[0].startswith("9/100 jobs")
    with plain_lines(lines.append, every_s=0.0) as show:
        show(looked(at(0, 0)))
        show(looked(at(1, 1)))
        assert len(lines) == 3


def test_a_terminal_sees_jobs_stages_and_queues():
    screen = io.StringIO()
    snapshot = Snapshot(
        jobs=50, earlier=1, done=20, failed=2, others=3, elapsed_s=10.0,
        busy={"denoise": 0.75}, waiting={"denoise": 2},
    )  # fmt: skip
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    with live_view(console) as show:
        show(Sight(snapshot, 2.0, 12.0))
        shown = screen.getvalue()
    for part in (
        "26/50",
        "2.00 pictures/s, 12 s left",
        "20 done here, 2 failed, 3 by other processes, 1 earlier",
        "75% busy",
        "2 waiting",
    ):
        assert part in shown


def test_views_are_shown_the_run_from_its_begin_to_its_end():
    seen: list[int] = []
    third = threading.Event()
    counts = iter(range(1000))

    def look() -> Snapshot:
        return at(0.0, next(counts))

    class View:
        def __enter__(self):
            return self.show

        def __exit__(self, *args):
            seen.append(-1)

        def show(self, sight):
            seen.append(sight.snapshot.done)
            if len(seen) == 3:
                third.set()

    with watching(look, [View()]):
        assert seen[0] == 0
        assert third.wait(60)
    assert seen == [*range(len(seen) - 1), -1]


def test_what_the_first_sight_raises_comes_before_the_block():
    class View:
        def __enter__(self):
            return self.show

        def __exit__(self, *args):
            return None

        def show(self, _):
            raise InputError("cannot show that")

    with pytest.raises(InputError, match="cannot show that"), watching(lambda: at(0, 0), [View()]):
        pytest.fail("the block began")


def test_a_stage_is_busy_while_its_first_item_is_under_way():
    begun, go = threading.Event(), threading.Event()

    def work(item):
        begun.set()
        assert go.wait(60)
        return []

    def fail(item, error):
        raise error

    stages = [Stage("first", lambda: work), Stage("second", lambda: work)]
    with Conveyor(stages, room=1, on_failure=fail) as conveyor:
        conveyor.put("item")
        assert begun.wait(60)
        busy = conveyor.busy(elapsed_s=3600.0)
        go.set()
    assert 0 < busy["first"] < 1
    assert busy["second"] == 0
