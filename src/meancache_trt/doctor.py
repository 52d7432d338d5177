"""What this machine can run, and what will be chosen, for it and for a bundle.

Nothing here waits for CUDA: driver and libraries are asked in processes of their own, each for a
limited time.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import msgspec

from meancache_trt.bundle import Bundle
from meancache_trt.engine.probe import Driver, Gpu, probe
from meancache_trt.engine.select import BackendState, available_backends, choose
from meancache_trt.engine.survey import LibraryState, survey
from meancache_trt.engine.tensorrt.library import EXTRAS, FLAVOURS, Flavour
from meancache_trt.engine.tensorrt.record import PlanRecord
from meancache_trt.engine.tensorrt.store import KIND, graph_digest, serves
from meancache_trt.errors import BundleError, MeanCacheError
from meancache_trt.meancache.files import decode_json
from meancache_trt.meancache.schedule import Schedule
from meancache_trt.meancache.sigmas import SigmaGrid
from meancache_trt.selection import check_grid, find_schedule, pipeline_grid

PACKAGES = (
    *("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python"),
    *("torch", "diffusers", "transformers", "tokenizers", "onnx", "numpy"),
)


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether something can be used here, and why or why not in a few words."""

    is_usable: bool
    why: str


class FlavourReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A TensorRT, and by the index of each GPU whether it makes plans for it.

    `compute_capabilities` are those that it builds for; None where it builds for the GPU at hand.
    """

    name: Flavour
    version: str | None
    problem: str | None
    compute_capabilities: tuple[str, ...] | None
    gpus: dict[str, Verdict]


class Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is taken where nothing is asked for, by name; None where there is nothing."""

    name: str | None
    why: str


class PlanReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan of a bundle, what it was built for, and whether it fits the first GPU here."""

    path: str
    component: str
    built_for: str
    verdict: Verdict


class ScheduleReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A schedule of a bundle, and whether it fits the bundle's default resolution."""

    name: str
    budget: int
    verdict: Verdict


class BundleReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What would be chosen for a bundle, at its default resolution."""

    path: str
    bundle_id: str
    backend: Chosen
    schedule: Chosen
    schedules: tuple[ScheduleReport, ...]
    plans: tuple[PlanReport, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that `doctor` says."""

    python: str
    platform: str
    cores: int
    free_disk_bytes: int
    packages: dict[str, str | None]
    driver: Driver
    onnxruntime: LibraryState
    flavours: tuple[FlavourReport, ...]
    backends: tuple[BackendState, ...]
    auto: Chosen
    bundle: BundleReport | None = None


def examine(bundle: Bundle | None = None, *, timeout_s: float = 10.0) -> Report:
    """Look at this machine, and at what a bundle has for it; returns within about `timeout_s`."""
    with ThreadPoolExecutor() as pool:
        driver_asked = pool.submit(probe, timeout_s=timeout_s)
        libraries = survey(timeout_s=timeout_s)
        driver = driver_asked.result()
    backends = available_backends(driver)
    flavours = tuple(_flavour(name, libraries[name], driver) for name in FLAVOURS)
    return Report(
        python=platform.python_version(),
        platform=platform.platform(),
        cores=len(os.sched_getaffinity(0)),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
        packages={name: _version(name) for name in PACKAGES},
        driver=driver,
        onnxruntime=libraries["onnxruntime"],
        flavours=flavours,
        backends=tuple(backends),
        auto=_chosen(None, driver, backends),
        bundle=None if bundle is None else _bundle(bundle, driver, libraries, backends),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _flavour(name: Flavour, state: LibraryState, driver: Driver) -> FlavourReport:
    gpus = {str(gpu.index): builds_for(state, gpu) for gpu in driver.gpus}
    problem = state.problem
    if state.problem == "not installed":
        problem = f"not installed: pip install 'meancache-trt[{EXTRAS[name]}]'"
    return FlavourReport(name, state.version, problem, state.compute_capabilities, gpus)


def builds_for(state: LibraryState, gpu: Gpu) -> Verdict:
    """Whether a TensorRT makes plans for a GPU."""
    if state.problem is not None:
        return Verdict(is_usable=False, why=state.problem)
    known = state.compute_capabilities
    if known is None:
        return Verdict(is_usable=True, why="builds on the GPU itself")
    if gpu.compute_capability in known:
        return Verdict(is_usable=True, why="builds for it on any machine")
    return Verdict(is_usable=False, why=f"builds for {', '.join(known)} only")


def _chosen(bundle: Bundle | None, driver: Driver, backends: Sequence[BackendState]) -> Chosen:
    choice = choose(bundle, driver=driver)
    states = {backend.name: backend for backend in backends}
    if states[choice.backend].is_available:
        return Chosen(choice.backend, choice.why)
    return Chosen(None, "; ".join(backend.state for backend in backends))


def _bundle(
    bundle: Bundle,
    driver: Driver,
    libraries: Mapping[str, LibraryState],
    backends: Sequence[BackendState],
) -> BundleReport:
    schedules = [bundle.schedule(name) for name in bundle.schedule_names()]
    return BundleReport(
        path=str(bundle.directory),
        bundle_id=bundle.manifest.bundle_id,
        backend=_chosen(bundle, driver, backends),
        schedule=_default_schedule(bundle),
        schedules=tuple(_schedule(bundle, schedule) for schedule in schedules),
        plans=tuple(
            _plan(bundle, addition.path, driver, libraries)
            for name, addition in bundle.manifest.additions.items()
            if name.startswith(f"{KIND}/")
        ),
    )


def _grid_of(bundle: Bundle, steps: int) -> SigmaGrid:
    return pipeline_grid(bundle.export, steps, bundle.export.resolution)


def _default_schedule(bundle: Bundle) -> Chosen:
    size = bundle.export.resolution.size
    try:
        found = find_schedule(bundle, None, size, lambda steps: _grid_of(bundle, steps))
    except MeanCacheError as error:
        return Chosen(None, str(error))
    kind = "calibrated" if found.calibration is not None else "there is none that is calibrated"
    return Chosen(found.name, f"the largest for {size}, {kind}")


def _schedule(bundle: Bundle, schedule: Schedule) -> ScheduleReport:
    size = bundle.export.resolution.size
    verdict = Verdict(is_usable=True, why=f"fits {size}")
    try:
        check_grid(bundle, schedule, size, _grid_of(bundle, schedule.grid.steps))
    except MeanCacheError as error:
        verdict = Verdict(is_usable=False, why=str(error))
    return ScheduleReport(schedule.name, schedule.budget, verdict)


def _plan(
    bundle: Bundle, sidecar: str, driver: Driver, libraries: Mapping[str, LibraryState]
) -> PlanReport:
    # One at a time: what is damaged, or another backend's, must not hide the others.
    try:
        record = decode_json(bundle.directory / sidecar, PlanRecord, BundleError)
    except MeanCacheError as error:
        return PlanReport(sidecar, "", "", Verdict(is_usable=False, why=f"no plan: {error}"))
    key = record.key
    return PlanReport(
        path=record.file.path,
        component=key.component,
        built_for=f"{key.flavour} {key.version}, compute capability {key.compute_capability}",
        verdict=_fits(bundle, record, driver, libraries),
    )


def _fits(
    bundle: Bundle, record: PlanRecord, driver: Driver, libraries: Mapping[str, LibraryState]
) -> Verdict:
    """Whether a plan is for the bundle's graph, an installed library and the first GPU."""
    key, state = record.key, libraries[record.key.flavour]
    component = bundle.export.components.get(key.component)
    reasons = []
    if component is None or graph_digest(bundle, component) != key.graph:
        reasons.append("it was built from another graph")
    if state.version != key.version:
        reasons.append(f"{key.flavour} here is {state.version or state.problem}")
    if not driver.gpus:
        reasons.append(cast("str", driver.problem))
    elif not serves(key, driver.gpus[0].compute_capability):
        reasons.append(f"the GPU's compute capability is {driver.gpus[0].compute_capability}")
    return Verdict(is_usable=not reasons, why="; ".join(reasons) or "fits this GPU and library")
