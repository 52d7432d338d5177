"""One graph to one plan file, in this process. `worker` runs it in a process of its own."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from meancache_trt.engine.tensorrt import timing
from meancache_trt.engine.tensorrt.library import ErrorLog, Library, load_library
from meancache_trt.engine.tensorrt.network import (
    NO_DRIVER,
    allow_unfused_attention,
    check_profile,
    inputs_of,
    outputs_of,
    parse,
)
from meancache_trt.engine.tensorrt.progress import Advance, monitor
from meancache_trt.engine.tensorrt.record import BuildOptions, PlanKey, PlanTensor
from meancache_trt.engine.tensorrt.target import builds_ahead, check_capabilities
from meancache_trt.errors import PlanError

# As TensorRT for RTX 1.7 names what it generates for Attention in bfloat16 and float16.
_FUSED_ATTENTION = re.compile(rb"_gemm_mha_v2_0x[0-9a-f]+")

Say = Callable[[str], None]


class BuildJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Build the ONNX file `graph` into the file `plan`, both absolute, as `key` says.

    `timing_cache` is read before the build and written after it; None keeps none.
    """

    graph: str
    plan: str
    key: PlanKey
    timing_cache: str | None = None


class Built(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """What became of a job: the file, and what its network definition says of it.

    `attention` is the number of Attention layers, `fused_attention` that of distinct fused kernels,
    which several layers may share; `peak_memory_bytes` the largest resident size of the process so
    far.
    """

    inputs: dict[str, PlanTensor]
    outputs: dict[str, PlanTensor]
    size_bytes: int
    sha256: str
    attention: int
    fused_attention: int
    build_s: float
    peak_memory_bytes: int


def build(
    job: BuildJob,
    *,
    advance: Advance = lambda _: True,
    say: Say = lambda _: None,
) -> Built:
    """Build a job's plan and sync it to disk.

    `advance` gets the share that is done, and returns False to stop the build; `say` what a user
    should know. TensorRT lets go of Python while it builds, so that other threads run.

    Raises:
        PlanError: where TensorRT refuses, with its own words, or the plan cannot be written.
        RuntimeUnavailableError: where the flavour is not installed.
    """
    key, start = job.key, time.perf_counter()
    library = load_library(key.flavour)
    if library.version != key.version:
        raise PlanError(
            f"expected {key.flavour} {key.version}, found {library.version}; plan again"
        )
    log = ErrorLog(library)
    builder = _builder(library, log)
    network = parse(library, builder, log, Path(job.graph))
    attention = allow_unfused_attention(library, network)
    inputs = inputs_of(network)
    check_profile(inputs, key.profile)
    config = builder.create_builder_config()
    _set_target(library, config, key.compute_capability)
    _set_options(library, config, log, key.options)
    _add_profile(library, builder, config, log, key)
    cache = timing.attach(library, config, log, job.timing_cache, say)
    watch = monitor(library, advance)
    config.progress_monitor = watch
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanError(_refusal(library, key, log))
    size, digest = _write(Path(job.plan), plan)
    if cache is not None:
        cache.save(say)
    return Built(
        inputs=inputs,
        outputs=outputs_of(network),
        size_bytes=size,
        sha256=digest,
        attention=attention,
        fused_attention=len(fused_attention_kernels(Path(job.plan))),
        build_s=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
    )


def fused_attention_kernels(plan: Path) -> set[str]:
    """Names of the fused attention kernels in a plan; without them a transformer is slow."""
    with (
        plan.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return {name.decode() for name in _FUSED_ATTENTION.findall(content)}


def peak_memory_bytes() -> int:
    """The largest resident size of this process; 0 where the system does not say.

    Not getrusage's, which begins with the size of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _builder(library: Library, log: ErrorLog) -> Any:
    try:
        return library.module.Builder(log.logger)
    except (TypeError, RuntimeError) as error:  # what the bindings make of a null pointer
        raise PlanError(
            f"{library.flavour} {library.version} cannot start: {log.reason()}"
        ) from error


def _refusal(library: Library, key: PlanKey, log: ErrorLog) -> str:
    return (
        f"{library.flavour} {library.version} cannot build {key.component} for compute capability "
        f"{key.compute_capability}: {log.reason(besides=NO_DRIVER)}"
    )


def _set_target(library: Library, config: Any, capability: str) -> None:
    """The GPU to build for; a library that builds for the one at hand takes it by itself."""
    if not builds_ahead(library):
        return
    check_capabilities(library, [capability])
    name = f"SM{capability.replace('.', '')}"
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(library.module.ComputeCapability.__members__[name], 0):
        raise PlanError(f"{library.flavour} {library.version} refuses to build for {capability}")


def _set_options(library: Library, config: Any, log: ErrorLog, options: BuildOptions) -> None:
    """Everything of `options`. Raises `PlanError` for what the library does not have or take."""
    trt = library.module
    log.warnings()
    if options.builder_optimization_level is not None:
        config.builder_optimization_level = options.builder_optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if options.hardware_compatibility != "none":
        config.hardware_compatibility_level = _level(
            library, "HardwareCompatibilityLevel", options.hardware_compatibility
        )
    if options.tiling_optimization_level != "none":
        config.tiling_optimization_level = _level(
            library, "TilingOptimizationLevel", options.tiling_optimization_level
        )
    if options.weight_streaming:
        config.set_flag(_level(library, "BuilderFlag", "weight_streaming"))
    elif "REQUIRE_USER_ALLOCATION" in trt.BuilderFlag.__members__:
        # A CUDA graph can then always be captured. TensorRT refuses it with weight streaming,
        # which cannot be captured either.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    warnings = log.warnings()
    if warnings:
        raise PlanError(
            f"{library.flavour} {library.version} does not take one of the options: "
            f"{'; '.join(warnings)} Leave it out"
        )


def _level(library: Library, kind: str, name: str) -> Any:
    """A member of one of TensorRT's enumerations, which older versions may lack."""
    found = getattr(getattr(library.module, kind, None), name.upper(), None)
    if found is None:
        raise PlanError(
            f"{library.flavour} {library.version} has no {kind}.{name.upper()}; leave the option "
            "out, or install a newer version"
        )
    return found


def _add_profile(library: Library, builder: Any, config: Any, log: ErrorLog, key: PlanKey) -> None:
    profile = builder.create_optimization_profile()
    for name, shapes in key.profile.items():
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
    if config.add_optimization_profile(profile) < 0:
        raise PlanError(
            f"{library.flavour} {library.version} refuses the shapes of {key.component}: "
            f"{log.reason(besides=NO_DRIVER)}"
        )


def _write(path: Path, plan: Any) -> tuple[int, str]:
    """Write and sync a serialised engine; its size and SHA-256."""
    try:
        with path.open("wb") as file:
            file.write(plan)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise PlanError(
            f"cannot write the plan {path}, {plan.nbytes / 1e6:.0f} MB: {error.strerror}; make "
            "room there"
        ) from error
    return int(plan.nbytes), hashlib.sha256(plan).hexdigest()
