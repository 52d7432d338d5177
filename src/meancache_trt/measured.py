"""What a backend takes here: to load a bundle's graphs, and for an evaluation."""

from __future__ import annotations

import time

import msgspec

from meancache_trt.bundle import Bundle
from meancache_trt.errors import BundleError
from meancache_trt.meancache.files import decode_json, encode_json
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import Pipeline

KIND = "measured"

_STEPS = 4
"""Evaluations that a time is a mean of; grids of two steps and more can be stretched."""


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a runtime took here: load time by graph, one evaluation with its update.

    An evaluation is the mean over a short grid, and so of both transformers where there are two.
    """

    runtime: str
    version: str
    threads: int
    load_ms: dict[str, float]
    evaluation_ms: float


def measure(bundle: Bundle, *, backend: str, threads: int) -> Measured:
    """Load every graph on a backend, measure an evaluation, and record both in the bundle.

    Text encoders are left out, as no part of an evaluation.

    Raises `RuntimeUnavailableError` where the backend cannot run here.
    """
    with Pipeline(bundle, backend=backend, threads=threads) as pipeline:
        load_ms = {}
        for part in bundle.export.parts():
            name, component = bundle.export.component_in(part, pipeline.runtime.precisions)
            if component.tokenizer:
                continue
            start = time.perf_counter()
            pipeline.graphs.graph(component)
            load_ms[name] = 1e3 * (time.perf_counter() - start)
        grid = pipeline.grid(_STEPS)  # no schedule of the bundle need fit this resolution
        schedule = bake("euler", grid, range(_STEPS))
        loop = pipeline.session(schedule).loop
        for _ in range(
            2
        ):  # the first allocates, the second makes a CUDA graph where there are some
            loop.run()
        pipeline.runtime.synchronize()
        start = time.perf_counter()
        loop.run()
        pipeline.runtime.synchronize()
        record = Measured(
            runtime=pipeline.runtime.name,
            version=pipeline.runtime.version,
            threads=threads,
            load_ms=load_ms,
            evaluation_ms=1e3 * (time.perf_counter() - start) / schedule.budget,
        )
    bundle.add_file(f"{KIND}/{record.runtime}", encode_json(record))
    return record


def measured_in(bundle: Bundle) -> list[Measured]:
    """What was measured of a bundle, one record a runtime."""
    return [
        decode_json(bundle.directory / addition.path, Measured, BundleError)
        for name, addition in bundle.manifest.additions.items()
        if name.startswith(f"{KIND}/")
    ]


def describe(record: Measured) -> str:
    """A line for people."""
    return f"{record.runtime} {record.version}: {record.evaluation_ms:.2f} ms an evaluation"
