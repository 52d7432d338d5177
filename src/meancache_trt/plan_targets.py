"""What plans are asked for: options of the builder, and which library builds for which GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from meancache_trt.engine.probe import find_gpu, probe
from meancache_trt.engine.tensorrt.library import (
    FLAVOURS,
    Flavour,
    Library,
    installed_flavours,
    load_library,
)
from meancache_trt.engine.tensorrt.record import BuildOptions
from meancache_trt.engine.tensorrt.target import (
    builds_ahead,
    check_capabilities,
    known_capabilities,
)
from meancache_trt.errors import InputError, RuntimeUnavailableError
from meancache_trt.record import Note


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
