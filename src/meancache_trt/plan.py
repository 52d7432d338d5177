"""What a backend makes of a bundle here: graphs loaded, an evaluation measured."""

from __future__ import annotations

import time

import msgspec

from meancache_trt.bundle import Bundle
from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import Pipeline

_PLAN_STEPS = 4
"""Evaluations that a plan's time is a mean of; grids of two steps and more can be stretched."""


class PlanRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a runtime prepared here: load time by graph, one evaluation with its update."""

    runtime: str
    version: str
    threads: int
    load_ms: dict[str, float]
    evaluation_ms: float


def plan(bundle: Bundle, *, backend: str, threads: int) -> PlanRecord:
    """Load every graph on a backend, measure an evaluation, and record both in the bundle.

    Raises `RuntimeUnavailableError` where the backend cannot run here.
    """
    with Pipeline(bundle, backend=backend, threads=threads) as pipeline:
        load_ms = {}
        for name, component in bundle.export.components.items():
            # ONNX Runtime on the CPU runs float32; text encoders are no part of an evaluation.
            if component.precision != "float32" or component.tokenizer:
                continue
            start = time.perf_counter()
            pipeline.graphs.graph(component)
            load_ms[name] = 1e3 * (time.perf_counter() - start)
        grid = pipeline.grid(_PLAN_STEPS)  # no schedule of the bundle need fit this resolution
        schedule = bake("euler", grid, range(_PLAN_STEPS))
        loop = pipeline.session(schedule).loop
        loop.run()  # the first run allocates
        start = time.perf_counter()
        loop.run()
        pipeline.runtime.synchronize()
        record = PlanRecord(
            runtime=pipeline.runtime.name,
            version=pipeline.runtime.version,
            threads=threads,
            load_ms=load_ms,
            evaluation_ms=1e3 * (time.perf_counter() - start) / schedule.budget,
        )
    bundle.add_file(f"plans/{record.runtime}", encode_json(record))
    return record
