"""Builds of single graphs, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from meancache_trt.engine.tensorrt.builder import BuildJob, Built, build
from meancache_trt.engine.tensorrt.library import load_library
from meancache_trt.engine.tensorrt.record import BuildOptions, PlanKey, ShapeRange
from meancache_trt.meancache.hashing import sha256_of


def make_job(
    graph: Path,
    folder: Path,
    profile: Mapping[str, ShapeRange],
    *,
    capability: str = "8.9",
    options: BuildOptions | None = None,
) -> BuildJob:
    """A build of `graph` by TensorRT for RTX, into a file in `folder`."""
    key = PlanKey(
        component=graph.stem,
        graph=sha256_of(graph),
        precision="float32",
        profile=profile,
        flavour="tensorrt_rtx",
        version=load_library("tensorrt_rtx").version,
        compute_capability=capability,
        options=options or BuildOptions(),
    )
    return BuildJob(graph=str(graph), plan=str(folder / f"{graph.stem}.plan"), key=key)


def build_alone(
    graph: Path,
    folder: Path,
    profile: Mapping[str, ShapeRange],
    *,
    capability: str = "8.9",
    options: BuildOptions | None = None,
) -> Built:
    """Build in this process."""
    return build(make_job(graph, folder, profile, capability=capability, options=options))
