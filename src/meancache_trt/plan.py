"""TensorRT plans of a bundle's graphs: which, for what, and built where they are not there yet."""

from __future__ import annotations

import datetime
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from meancache_trt.bundle import Bundle
from meancache_trt.engine.probe import find_gpu, probe
from meancache_trt.engine.tensorrt.builder import BuildJob, Built
from meancache_trt.engine.tensorrt.library import (
    FLAVOURS,
    Flavour,
    Library,
    installed_flavours,
    load_library,
)
from meancache_trt.engine.tensorrt.memory import check_memory, predicted_plan_bytes
from meancache_trt.engine.tensorrt.process import run_build
from meancache_trt.engine.tensorrt.record import (
    BuildOptions,
    PlanFile,
    PlanKey,
    PlanRecord,
    ShapeRange,
)
from meancache_trt.engine.tensorrt.store import PlanStore, graph_digest
from meancache_trt.engine.tensorrt.target import (
    builds_ahead,
    check_capabilities,
    has_bfloat16,
    known_capabilities,
    parse_capability,
    precisions_for,
)
from meancache_trt.engine.tensorrt.timing import default_path, uses_timing_cache
from meancache_trt.errors import (
    InputError,
    PlanError,
    PlanMismatchError,
    RuntimeUnavailableError,
)
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.job import PIPELINE_FOLDER
from meancache_trt.export.profiles import profile
from meancache_trt.export.registry import FAMILIES
from meancache_trt.export.safetensors_file import read_tensors
from meancache_trt.manifest import Component, Exported
from meancache_trt.record import Note, Report
from meancache_trt.shapes import Range, Ranges

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Progress = Callable[[str], AbstractContextManager[Report]]
"""Begins a progress bar under a title."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is asked of the builder.

    `compute_capabilities` are GPUs that need not be here; empty means the one that is.
    `timing_cache` None means a file in the user's cache directory. `is_memory_checked` is off where
    a user goes on although memory is short.
    """

    compute_capabilities: tuple[str, ...] = ()
    build: BuildOptions = field(default_factory=BuildOptions)
    timing_cache: Path | None = None
    is_memory_checked: bool = True


@dataclass(frozen=True)
class Target:
    """A library, and the compute capability that it builds for."""

    library: Library
    capability: str


@dataclass(frozen=True)
class Planned:
    """A plan of a bundle, and whether it was there already."""

    record: PlanRecord
    is_reused: bool


@dataclass(frozen=True)
class _Work:
    """A plan to have: its key, and the graph it is built from.

    `built_bytes` are its weights' in the precision of the plan.
    """

    component: Component
    key: PlanKey
    built_bytes: int

    @property
    def title(self) -> str:
        return f"{self.key.component} for {self.key.compute_capability}"


def find_targets(backend: str, options: PlanOptions, *, note: Note) -> list[Target]:
    """What to plan for; empty where ONNX Runtime, which needs no plans, is all there is.

    `backend` "auto" means TensorRT for RTX for compute capabilities, and without these what suits
    the GPU at hand.

    Raises:
        InputError, PlanError: for compute capabilities that cannot be planned for.
        RuntimeUnavailableError: where a flavour is asked for that is not installed, or a GPU is
            needed and there is none.
    """
    capabilities = options.compute_capabilities
    if backend not in ("auto", *FLAVOURS):
        if options != PlanOptions(is_memory_checked=options.is_memory_checked):
            raise InputError(
                f"{backend} takes no plans; leave their options out, or give --backend tensorrt_rtx"
            )
        return []
    if capabilities:
        library = load_library(_flavour(backend) or "tensorrt_rtx")
        check_capabilities(library, capabilities)
        return [Target(library, capability) for capability in dict.fromkeys(capabilities)]
    flavour = _flavour(backend)
    return _at_hand(note) if flavour is None else [_for_gpu(load_library(flavour))]


def _flavour(backend: str) -> Flavour | None:
    return next((flavour for flavour in FLAVOURS if flavour == backend), None)


def _for_gpu(library: Library) -> Target:
    try:
        gpu = find_gpu()
    except RuntimeUnavailableError as error:
        if not builds_ahead(library):
            raise
        raise RuntimeUnavailableError(
            f"{error}; or give --compute-capability, such as 8.9, to plan for a GPU elsewhere"
        ) from error
    if builds_ahead(library):
        check_capabilities(library, [gpu.compute_capability])
    return Target(library, gpu.compute_capability)


def _at_hand(note: Note) -> list[Target]:
    """What "auto" plans for: the GPU that is here, if a TensorRT that builds for it is too."""
    driver = probe()
    if not driver.gpus:
        note(
            f"no TensorRT plans, since {driver.problem}; `--compute-capability 8.9` builds them "
            "for a GPU elsewhere"
        )
        return []
    capability = driver.gpus[0].compute_capability
    for flavour in installed_flavours():
        try:
            library = load_library(flavour)
        except RuntimeUnavailableError as error:  # a damaged package; the other one may do
            note(str(error))
            continue
        if not builds_ahead(library) or capability in known_capabilities(library):
            return [Target(library, capability)]
    note(
        f"no TensorRT plans: nothing that is installed builds for compute capability {capability}; "
        "see `meancache-trt doctor`"
    )
    return []


def plan(
    bundles: Sequence[Bundle],
    targets: Sequence[Target],
    options: PlanOptions,
    *,
    ranges: Callable[[Exported], Ranges] = lambda export: export.ranges,
    note: Note,
    progress: Progress,
    is_forced: bool = False,
) -> list[list[Planned]]:
    """Have a plan of every component of each bundle for every target; those that are there stay.

    `ranges` says what sizes a bundle is planned for. Everything is checked before the first plan is
    built; each is built in a process of its own and kept when it is whole, so that what was built
    before an error, or Ctrl-C, need not be built again. `is_forced` builds all of them.

    Raises:
        InputError: for a size that a family cannot take, a GPU without the bundle's precision, or
            a bundle that cannot be written.
        PlanError: where TensorRT refuses, or memory is short.
    """
    works = [
        [
            work
            for target in targets
            for work in _works(bundle, target, options.build, ranges(bundle.export))
        ]
        for bundle in bundles
    ]
    for bundle, of_bundle in zip(bundles, works, strict=True) if targets else ():
        store, tell = PlanStore(bundle), _note_of(bundle, bundles, note)
        _note_what_is_left_out(bundle.export, ranges(bundle.export), tell)
        for path in store.clean():
            tell(f"removed {path}, which a build that ended midway left behind")
        missing = [work for work in of_bundle if is_forced or _usable(store, work) is None]
        _check_room(bundle, missing, options)
    _note_timing_cache(targets, options, note)
    return [
        [
            _have(
                PlanStore(bundle),
                work,
                options,
                note=_note_of(bundle, bundles, note),
                progress=progress,
                is_forced=is_forced,
            )
            for work in of_bundle
        ]
        for bundle, of_bundle in zip(bundles, works, strict=True)
    ]


def _note_of(bundle: Bundle, bundles: Sequence[Bundle], note: Note) -> Note:
    """Notes that say which of several bundles they are about."""
    if len(bundles) == 1:
        return note
    return lambda text: note(f"{bundle.directory.name}: {text}")


def _works(
    bundle: Bundle, target: Target, options: BuildOptions, ranges: Ranges
) -> Iterator[_Work]:
    export, library = bundle.export, target.library
    _check_precision(export, target.capability)
    family = FAMILIES[export.family]
    parts = ("transformer", "vae", *family.text_components)
    configs = Checkpoint(bundle.directory / PIPELINE_FOLDER).configs(parts)
    for part in export.parts():
        name, component = export.component_in(part, precisions_for(target.capability))
        shapes = profile(component, family, configs, ranges)
        key = PlanKey(
            component=name,
            graph=graph_digest(bundle, component),
            precision=component.precision,
            profile={tensor: ShapeRange(*ends) for tensor, ends in shapes.items()},
            flavour=library.flavour,
            version=library.version,
            compute_capability=target.capability,
            options=options,
        )
        yield _Work(component, key, _built_bytes(bundle, component))


def _built_bytes(bundle: Bundle, component: Component) -> int:
    """A component's weights in its own precision, which may not be what they are stored in."""
    files = [bundle.directory / file.path for file in component.weights]
    tensors = [tensor for file in files for tensor in read_tensors(file).values()]
    elements = sum(math.prod(tensor.shape) for tensor in tensors)
    stored = sum(tensor.length for tensor in tensors) / elements if elements else 1
    wanted = _ITEM_BYTES[component.precision] if elements else 1
    return int(component.weight_bytes * wanted / stored)


def _check_precision(export: Exported, capability: str) -> None:
    parse_capability(capability)
    there = export.components
    is_rounded = "transformer/bfloat16" in there and "transformer/float16" not in there
    if is_rounded and not has_bfloat16(capability):
        raise InputError(
            f"compute capability {capability} has no bfloat16, found graphs in bfloat16 and "
            "float32; export with `--precision float16`"
        )


def _note_what_is_left_out(export: Exported, planned: Ranges, note: Note) -> None:
    """Note sizes that the bundle lists and its plans will not cover."""
    for name, listed in msgspec.structs.asdict(export.ranges).items():
        given = getattr(planned, name)
        if isinstance(listed, Range) and isinstance(given, Range) and not _covers(given, listed):
            note(
                f"the bundle lists {name.replace('_', ' ')} {listed}, its plans are for {given} "
                "and will not run the rest"
            )
    if all(component.precision == "float32" for component in export.components.values()):
        note(
            "the bundle has graphs in float32 only, which run slower and without fused attention; "
            "`--precision bfloat16` exports others"
        )


def _covers(given: Range, listed: Range) -> bool:
    return given.min <= listed.min and listed.max <= given.max


def _check_room(bundle: Bundle, missing: Sequence[_Work], options: PlanOptions) -> None:
    """Raise where memory or disk will not do for plans that are to be built."""
    for work in missing if options.is_memory_checked else ():
        check_memory(work.title, work.component.weight_bytes, work.built_bytes)
    wanted = sum(predicted_plan_bytes(work.built_bytes) for work in missing)
    free = shutil.disk_usage(bundle.directory).free
    if wanted > free:
        raise InputError(
            f"{len(missing)} plans of {bundle.directory} are expected to take {wanted / 1e9:.1f} "
            f"GB, found {free / 1e9:.1f} GB of free disk; make room there"
        )


def _note_timing_cache(targets: Sequence[Target], options: PlanOptions, note: Note) -> None:
    unused = {target.library.flavour for target in targets}
    for flavour in sorted(name for name in unused if not uses_timing_cache(name)):
        if options.timing_cache is not None:
            note(f"{flavour} times no kernels, so {options.timing_cache} is neither read nor made")


def _have(
    store: PlanStore,
    work: _Work,
    options: PlanOptions,
    *,
    note: Note,
    progress: Progress,
    is_forced: bool,
) -> Planned:
    def wait() -> None:
        note(f"{work.title}: another process builds it; waiting")

    found = None if is_forced else _usable(store, work)
    if found is None:
        with store.lock(work.key, wait):
            found = None if is_forced else _usable(store, work, note)
            if found is None:
                record = _build(store, work, options, note=note, progress=progress)
                return Planned(record, is_reused=False)
    note(f"{work.title}: reused")
    return Planned(found, is_reused=True)


def _usable(store: PlanStore, work: _Work, note: Note = lambda _: None) -> PlanRecord | None:
    """The plan that is there, if its file is what was built."""
    record = store.find(work.key)
    try:
        if record is not None:
            store.checked_path(record)
    except PlanMismatchError as error:
        note(f"{work.title}: {error}")
        return None
    return record


def _build(
    store: PlanStore, work: _Work, options: PlanOptions, *, note: Note, progress: Progress
) -> PlanRecord:
    key = work.key
    with store.building(key) as file:
        job = BuildJob(
            graph=str(store.bundle.component_path(work.component).absolute()),
            plan=str(file.absolute()),
            key=key,
            timing_cache=_timing_cache(key, options),
        )
        with progress(work.title) as report:
            built = run_build(job, report=lambda share: report(int(100 * share), 100), say=note)
        _check_unchanged(store.bundle, key)
        record = store.add(_record(key, built), file)
    note(f"{work.title}: {_summary(built)}")
    return record


def _check_unchanged(bundle: Bundle, key: PlanKey) -> None:
    """Raise `PlanError` where another export took the bundle's place during a build."""
    bundle.refresh()
    component = bundle.export.components.get(key.component)
    if component is None or graph_digest(bundle, component) != key.graph:
        raise PlanError(
            f"the graph of {key.component} in {bundle.directory} changed while its plan was built; "
            "plan again"
        )


def _timing_cache(key: PlanKey, options: PlanOptions) -> str | None:
    if not uses_timing_cache(key.flavour):
        return None
    default = default_path(key.flavour, key.version, key.compute_capability)
    return str((options.timing_cache or default).absolute())


def _record(key: PlanKey, built: Built) -> PlanRecord:
    now = datetime.datetime.now(datetime.UTC)
    return PlanRecord(
        key=key,
        inputs=built.inputs,
        outputs=built.outputs,
        file=PlanFile("", built.size_bytes, built.sha256),
        fused_attention=built.fused_attention,
        build_s=round(built.build_s, 3),
        peak_memory_bytes=built.peak_memory_bytes,
        built_at=now.isoformat(timespec="microseconds"),
    )


def _summary(built: Built) -> str:
    fused = built.fused_attention
    attention = f", {fused} fused attention kernel{'s' * (fused > 1)}" if fused else ""
    if built.attention and not fused:
        attention = ", attention not fused"
    return f"built in {built.build_s:.1f} s, {built.size_bytes / 1e6:.1f} MB{attention}"
