"""Durations of ways to do the same, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Step = Callable[[], object]


def interleaved_ms(
    ways: Mapping[str, Step], wait: Step, rounds: int, *, warm_ups: int = 2
) -> dict[str, float]:
    """Median milliseconds of each way, from its start until `wait` returns.

    All ways run in every round one after the other, so that clocks and temperature are the same for
    all: their ratios travel, the milliseconds do not. `warm_ups` are rounds
    that are not timed: they capture graphs, choose kernels and bring clocks up.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warm_ups):
        for way in ways.values():
            way()
            wait()
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_once_ms(way, wait))
    return {name: statistics.median(values) for name, values in times.items()}


def launch_ms(way: Step, wait: Step, rounds: int) -> float:
    """Median milliseconds until a way returns to the host, its work still under way."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        way()
        times.append(1e3 * (time.perf_counter() - begin))
        wait()
    return statistics.median(times)


def _once_ms(way: Step, wait: Step) -> float:
    begin = time.perf_counter()
    way()
    wait()
    return 1e3 * (time.perf_counter() - begin)
