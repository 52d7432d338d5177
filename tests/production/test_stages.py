"""The conveyor: order, bounds, and that it ends whatever a stage raises and whenever it stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meancache_trt.production.stages import Conveyor, Stage, Work

_PATIENCE_S = 30
"""Far more than any of these takes; a conveyor that never ends fails its test, not the test run."""


def give_up(item: object, error: Exception) -> None:
    raise error


def stage(name: str, work: Work, threads: int = 1) -> Stage:
    return Stage(name, lambda: work, threads)


def keep(found: list[Any]) -> Work:
    def work(item: Any) -> list[Any]:
        found.append(item)
        return []

    return work


def within_patience(work: Callable[[], None]) -> None:
    """Run `work` in a thread and raise what it raises, or fail where it does not end."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    assert not thread.is_alive(), "the conveyor did not end"
    if raised:
        raise raised[0]


def test_what_is_put_in_is_through_at_the_end_in_order() -> None:
    found: list[int] = []
    stages = [
        stage("double", lambda n: [n, n]),
        stage("add", lambda n: [n + 1]),
        stage("keep", keep(found)),
    ]
    with Conveyor(stages, room=1, on_failure=give_up) as conveyor:
        for number in range(50):
            conveyor.put(number)
    assert found == [number + 1 for number in range(50) for _ in range(2)]
    assert conveyor.waiting() == {"double": 0, "add": 0, "keep": 0}


def test_threads_of_a_stage_share_its_items_and_each_makes_its_own_work() -> None:
    found: list[int] = []
    makers: set[int] = set()

    def make() -> Work:
        own = threading.get_ident()
        makers.add(own)

        def work(item: int) -> list[int]:
            assert threading.get_ident() == own
            return [item]

        return work

    with Conveyor([Stage("pass", make, 3), stage("keep", keep(found))], room=2, on_failure=give_up):
        pass
    assert len(makers) == 3
    with Conveyor(
        [Stage("pass", make, 3), stage("keep", keep(found))], room=2, on_failure=give_up
    ) as conveyor:
        for number in range(100):
            conveyor.put(number)
    assert sorted(found) == list(range(100))


def test_a_slow_stage_holds_up_those_before_it() -> None:
    may_go, made = threading.Event(), 0

    def hold(item: int) -> list[int]:
        may_go.wait(_PATIENCE_S)
        return []

    def count() -> Iterator[int]:
        nonlocal made
        with Conveyor(
            [stage("pass", lambda n: [n]), stage("hold", hold)], room=2, on_failure=give_up
        ) as conveyor:
            for number in range(20):
                conveyor.put(number)
                made += 1
                yield made

    feeding = threading.Thread(target=lambda: list(count()))
    feeding.start()
    while made < 6:  # one held, two before it, one in hand, two before that
        time.sleep(0.001)
    time.sleep(0.2)
    assert made == 6
    may_go.set()
    feeding.join()
    assert made == 20


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_an_error_ends_it_though_all_queues_are_full(place: int, error: BaseException) -> None:
    """`SystemExit` stands for what is no `Exception`: a panic of a library in Rust is none."""
    is_full = threading.Event()
    stopped: list[BaseException] = []

    def explode(item: int) -> list[int]:
        is_full.wait(_PATIENCE_S)
        raise error

    def run() -> None:
        works: list[Work] = [lambda n: [n, n, n] for _ in range(3)]
        works[place] = explode
        stages = [stage(f"s{index}", work, 2) for index, work in enumerate(works)]
        with Conveyor(stages, room=1, on_failure=give_up, on_stop=stopped.append) as conveyor:
            opener = threading.Timer(0.1, is_full.set)
            opener.start()
            for number in range(100):  # waits while all is full, and must wake up again
                conveyor.put(number)
            opener.join()
            assert conveyor.is_stopped

    with pytest.raises(type(error)) as caught:
        within_patience(run)
    assert caught.value is error
    assert stopped == [error]


def test_a_failed_item_is_reported_and_the_others_go_on() -> None:
    found: list[int] = []
    failed: list[tuple[int, str]] = []

    def refuse_odd(item: int) -> list[int]:
        if item % 2:
            raise ValueError(f"odd {item}")
        return [item]

    with Conveyor(
        [stage("refuse", refuse_odd), stage("keep", keep(found))],
        room=2,
        on_failure=lambda item, error: failed.append((item, str(error))),
    ) as conveyor:
        for number in range(6):
            conveyor.put(number)
    assert found == [0, 2, 4]
    assert failed == [(1, "odd 1"), (3, "odd 3"), (5, "odd 5")]


def test_a_stage_that_cannot_be_made_stops_it() -> None:
    def make() -> Work:
        raise ValueError("no device")

    def run() -> None:
        with Conveyor([Stage("never", make, 2)], room=1, on_failure=give_up) as conveyor:
            for number in range(10):
                conveyor.put(number)

    with pytest.raises(ValueError, match="no device"):
        within_patience(run)


def test_an_error_of_who_feeds_it_drops_what_waits_and_finishes_what_is_under_way() -> None:
    begun, may_go = threading.Event(), threading.Event()
    found: list[int] = []

    def hold(item: int) -> list[int]:
        begun.set()
        may_go.wait(_PATIENCE_S)
        found.append(item)
        return []

    def run() -> None:
        with Conveyor([stage("hold", hold)], room=3, on_failure=give_up) as conveyor:
            for number in range(4):
                conveyor.put(number)
            begun.wait(_PATIENCE_S)
            threading.Timer(0.1, may_go.set).start()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        within_patience(run)
    assert found == [0]


def test_shares_of_time_are_of_all_threads_of_a_stage() -> None:
    stages = [stage("sleep", lambda _: time.sleep(0.05) or [], 2)]
    with Conveyor(stages, room=2, on_failure=give_up) as conveyor:
        for number in range(4):
            conveyor.put(number)
    assert conveyor.busy_s["sleep"] >= 4 * 0.05
    assert conveyor.busy(1.0)["sleep"] == conveyor.busy_s["sleep"] / 2
    assert conveyor.busy(0.0) == {"sleep": 0.0}
