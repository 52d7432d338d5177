"""TensorRT plans of a bundle's graphs: which, for what, and built where they are not there yet."""

from __future__ import annotations

import datetime
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import msgspec

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.builder import BuildJob, Built
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
    has_bfloat16,
    parse_capability,
    precisions_for,
)
from meancache_trt.engine.tensorrt.timing import default_path, uses_timing_cache
from meancache_trt.errors import (
    InputError,
    PlanError,
    PlanMismatchError,
)
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.job import PIPELINE_FOLDER
from meancache_trt.export.profiles import profile
from meancache_trt.export.registry import FAMILIES
from meancache_trt.export.safetensors_file import read_tensors
from meancache_trt.manifest import Component, Exported
from meancache_trt.plan_targets import PlanOptions, Target
from meancache_trt.record import Note, Report
from meancache_trt.shapes import Range, Ranges

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Progress = Callable[[str], AbstractContextManager[Report]]
"""Begins a progress bar under a title."""


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


def prune(bundle: Bundle, targets: Sequence[Target], *, note: Note, is_removed: bool) -> None:
    """Note the plans that a bundle keeps of other graphs and library versions, or remove them.

    Raises `InputError` where the bundle cannot be written.
    """
    store = PlanStore(bundle)
    versions = {str(target.library.flavour): target.library.version for target in targets}
    outdated = store.outdated(versions)
    if not outdated:
        return
    size = sum(record.file.size_bytes for record in outdated) / 1e6
    what = f"{len(outdated)} of the plans in {bundle.directory}, {size:.1f} MB, are"
    if is_removed:
        store.remove(outdated)
        note(f"{what} of other graphs or versions: removed")
    else:
        note(f"{what} of other graphs or versions; --prune removes them")


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
