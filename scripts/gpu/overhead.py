"""What a loop takes besides its engines, and what one CUDA graph saves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scripts.gpu.bench import Bench, Pair
from scripts.gpu.record import Check, measured
from scripts.gpu.timing import Step, interleaved_ms, launch_ms
from scripts.gpu.watched import Watched

from meancache_trt.meancache.runtime import Call
from meancache_trt.session import Session

NAME = "overhead"
ABOUT = "loop time without its engines, captured graph against plain calls, cost of launching"


def run(bench: Bench) -> Iterator[Check]:
    """Every backend on every stand-in."""

    def look(pair: Pair, backend: str) -> Iterator[Check]:
        yield from bench.attempt(
            "loop", lambda: loop_times(pair, bench.settings.rounds), backend, pair.subject
        )

    return bench.over_pairs(NAME, look)


def loop_times(pair: Pair, rounds: int) -> Iterator[Check]:
    """One loop as a captured graph and as plain calls, beside its network and update calls alone.

    The engines alone are captured too, so that what the loop takes besides them is neither their
    launching nor the host's. Captured work of one kind runs without gaps.
    """
    runtime = pair.tested.runtime
    watched, plain = Watched(runtime), Watched(runtime, is_captured=False)
    sessions = [pair.session(runtime=one) for one in (watched, plain)]
    for session in sessions:
        pair.render(session, pair.requests[:1])
    engines = _calls(pair, watched, "transformer")
    captured, apart = (session.loop.run for session in sessions)
    ways = {
        "loop, captured": captured,
        "loop, plain calls": apart,
        "network, captured": runtime.sequence(engines).enqueue,
        "update, captured": runtime.sequence(_updates(pair, watched)).enqueue,
        "loop, a graph an evaluation": _with_callback(sessions[0]),
    }
    times = interleaved_ms(ways, runtime.synchronize, rounds)
    yield from (measured(name, value, "ms") for name, value in times.items())
    count = len(engines)
    besides = times["loop, captured"] - times["network, captured"]
    yield measured("besides the network, an evaluation", besides / count, "ms")
    yield measured("besides the network, share", besides / times["loop, captured"], "of the loop")
    gain = times["loop, plain calls"] / times["loop, captured"]
    yield measured("gain of one graph", gain, "x", "plain calls against the captured loop")
    for name, way in (("captured", captured), ("plain calls", apart)):
        cost = launch_ms(way, runtime.synchronize, rounds)
        yield measured(f"launching, {name}", cost / count, "ms an evaluation")


def _calls(pair: Pair, watched: Watched, part: str) -> list[Call]:
    """The calls of the network's graph, one an evaluation, in order."""
    component = pair.tested.graphs.network(part)
    return watched.calls[pair.tested.bundle.component_path(component)]


def _updates(pair: Pair, watched: Watched) -> list[Call]:
    folder: Path = pair.tested.bundle.directory
    component = pair.tested.bundle.export.update_for(pair.schedule.history)
    return watched.calls[folder / component.path]


def _with_callback(session: Session) -> Step:
    """The loop as it runs where progress is asked for: it waits after each evaluation."""
    heard: list[int] = []
    return lambda: session.loop.run(lambda done, _: heard.append(done))
