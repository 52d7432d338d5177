"""Device memory of sessions, and whether it comes back."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.gpu import bounds
from scripts.gpu.bench import Bench, Pair
from scripts.gpu.bounds import MIB
from scripts.gpu.record import Check, judged, measured, skipped

from meancache_trt.engine.probe import probe
from meancache_trt.manifest import Component, batch_symbols
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import load
from meancache_trt.session import Session

NAME = "memory"
ABOUT = "device memory of sessions and schedules, the shared activation block, leaks"

Meter = Callable[[], int]


def device_bytes() -> int:
    """Memory of the first GPU that is in use, by all processes, as its driver says."""
    gpu = probe().gpus[0]
    return gpu.total_bytes - gpu.free_bytes


def resident_bytes() -> int:
    """Memory of this process, for a rehearsal."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(bench: Bench) -> Iterator[Check]:
    """Sessions and cycles of every backend, on every stand-in."""
    meter = resident_bytes if bench.settings.is_rehearsal else device_bytes

    def look(pair: Pair, backend: str) -> Iterator[Check]:
        place = (backend, pair.subject)
        yield from bench.attempt("sessions", lambda: sessions_take(pair, meter), *place)
        yield from bench.attempt("activations", lambda: activations_are_shared(pair), *place)
        if pair.subject == bench.settings.subjects[0]:
            yield from bench.attempt("leak", lambda: leak(pair), *place)

    def leak(pair: Pair) -> Check:
        settings = bench.settings
        limit_s = settings.limit_s / (2 * len(settings.backends))  # half of it, for all backends
        return nothing_leaks(pair, meter, settings.cycles, limit_s)

    return bench.over_pairs(NAME, look)


def sessions_take(pair: Pair, meter: Meter) -> Iterator[Check]:
    """What the graphs take, then each further session: another schedule, a batch of four."""
    before = meter()
    kept = [pair.session()]
    pair.render(kept[0], pair.requests[:1])
    yield measured("graphs and first session", (meter() - before) / MIB, "MiB")
    grid = pair.reference.grid(pair.schedule.grid.steps)
    for budget in (2, 4, 8):
        before = meter()
        schedule = bake("ab2", grid, range(0, grid.steps, max(1, grid.steps // budget)))
        kept.append(Session(pair.tested.graphs, schedule, pair.tested.resolution()))
        pair.render(kept[-1], pair.requests[:1])
        name = f"session of {schedule.budget} evaluations, history {schedule.history}"
        yield measured(name, (meter() - before) / MIB, "MiB")
    before = meter()
    kept.append(pair.session(batch=len(pair.requests)))
    pair.render(kept[-1], pair.requests)
    yield measured(f"session of {len(pair.requests)} pictures", (meter() - before) / MIB, "MiB")


def activations_are_shared(pair: Pair) -> Iterator[Check]:
    """The block that the engines of a lane share, against the sum of what each would take."""
    name = "shared activations"
    runtime: Any = pair.tested.runtime
    if not hasattr(runtime, "lane") or not hasattr(runtime, "block"):
        yield skipped(name, f"{runtime.name} leaves activations to its library")
        return
    pair.render(pair.session(), pair.requests[:1])
    alone = {part: _alone(pair, component) for part, component in _parts(pair).items()}
    total = sum(alone.values())
    note = ", ".join(f"{part} {size / MIB:.2f}" for part, size in alone.items())
    yield measured(name, runtime.block.size_bytes / MIB, "MiB", f"each alone: {note}")
    yield measured("sum of activations", total / MIB, "MiB", "what they would take one by one")


def _parts(pair: Pair) -> dict[str, Component]:
    """The graphs that a session runs."""
    graphs, export = pair.tested.graphs, pair.tested.bundle.export
    return {
        "prepare": export.components["prepare"],
        **{part: graphs.network(part) for part in export.transformers},
        "update": export.update_for(pair.schedule.history),
        "vae_decoder": graphs.network("vae_decoder"),
    }


def _alone(pair: Pair, component: Component) -> int:
    """Bytes of the activation block of a lane that binds one graph only."""
    runtime: Any = pair.tested.runtime
    sizes = {**pair.tested.resolution().symbols, **batch_symbols(1)}
    with runtime.lane() as lane:
        graph = lane.load(pair.tested.bundle.component_path(component))
        records = {**component.inputs, **component.outputs}
        tensors = {
            name: lane.zeros(record.resolved(sizes), record.dtype)
            for name, record in records.items()
        }
        call = graph.bind(tensors)
        size: int = lane.block.size_bytes
        del call
    return size


def nothing_leaks(pair: Pair, meter: Meter, cycles: int, limit_s: float) -> Check:
    """Open, render one picture and close, many times; growth once libraries have settled."""
    directory, ends_at = pair.tested.bundle.directory, time.monotonic() + limit_s
    settled = done = 0
    while done < cycles and time.monotonic() < ends_at:
        with load(directory, backend=pair.backend, embedding_cache="off") as pipeline:
            session = Session(pipeline.graphs, pair.schedule, pipeline.resolution())
            pair.render(session, pair.requests[:1])
            del session
        done += 1
        if done == _settled_after(cycles):
            gc.collect()
            settled = meter()
    if done < 2 * _settled_after(cycles):
        return skipped("leak", f"{limit_s:.0f} s were enough for {done} cycles only")
    gc.collect()
    return judged(
        f"growth over {done} cycles",
        (meter() - settled) / MIB,
        bounds.LEAK.value / MIB,
        unit="MiB",
        reason=bounds.LEAK.reason,
        note=f"after the first {_settled_after(cycles)}",
    )


def _settled_after(cycles: int) -> int:
    """When pools of libraries have grown: a tenth of the cycles."""
    return max(1, cycles // 10)
