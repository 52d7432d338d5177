"""Which backend runs here, and why."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal, get_args

from meancache_trt.bundle import Bundle
from meancache_trt.engine.probe import Driver, Gpu, find_gpu
from meancache_trt.engine.tensorrt.library import EXTRAS, FLAVOURS, Flavour, installed_flavours
from meancache_trt.errors import InputError, PlanError, RuntimeUnavailableError
from meancache_trt.meancache.runtime import Runtime

Backend = Literal["auto", "onnxruntime", "onnxruntime_cuda", "tensorrt", "tensorrt_rtx"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_CPU = "onnxruntime"
_CUDA = "onnxruntime_cuda"


@dataclass(frozen=True)
class Choice:
    """A backend by name, and why that one, in a few words."""

    backend: str
    why: str


def open_runtime(
    backend: str = "auto",
    *,
    bundle: Bundle | None = None,
    threads: int = 0,
    device: int = 0,
    stream: object | None = None,
) -> Runtime:
    """Open a backend; a context manager.

    Args:
        backend: one of `BACKENDS`; "auto" is what `choose` says.
        bundle: whose plans a TensorRT runs; the other backends do without.
        threads: cores that a graph may use on the CPU; 0 means all.
        device: index of the GPU.
        stream: a host's own CUDA stream to work on, as a `cudaStream_t` or an object with
            `__cuda_stream__`; by default a new one.

    Raises:
        InputError: for an unknown name, a stream that cannot be used, or a TensorRT without bundle.
        RuntimeUnavailableError: where there is no GPU for it, or its package is not installed.
        PlanMismatchError: where a TensorRT has no plan that it can load here.
    """
    gpu = check_backend(backend, device)
    if backend == "auto":
        backend = choose(bundle, device).backend
        gpu = None if backend == _CPU else find_gpu(device)
    if gpu is None:
        from meancache_trt.engine.onnxruntime import OnnxRuntime  # noqa: PLC0415  (optional)

        return OnnxRuntime(threads)
    if backend == _CUDA:
        from meancache_trt.engine.onnxruntime_cuda import open_onnxruntime_cuda  # noqa: PLC0415

        return open_onnxruntime_cuda(gpu, threads=threads, stream=stream)
    if bundle is None:
        raise InputError(f"the backend {backend} runs the plans of a bundle; give one")
    from meancache_trt.engine.tensorrt.runtime import open_tensorrt  # noqa: PLC0415

    return open_tensorrt(bundle, _flavour(backend), gpu, stream=stream)


def check_backend(backend: str, device: int = 0) -> Gpu | None:
    """The GPU that a backend named explicitly will use; None for the CPU and for "auto".

    Quick, so that what cannot run is refused before anything is read or hashed. Raises
    `InputError` for an unknown name, `RuntimeUnavailableError` where the GPU or package is missing.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend in ("auto", _CPU):
        return None
    gpu = find_gpu(device)
    if backend in FLAVOURS and backend not in installed_flavours():
        raise RuntimeUnavailableError(
            f"the backend {backend} needs the package {backend}, which is not installed; run "
            f"`pip install 'meancache-trt[{EXTRAS[_flavour(backend)]}]'`"
        )
    return gpu


def choose(bundle: Bundle | None = None, device: int = 0, driver: Driver | None = None) -> Choice:
    """What "auto" runs; `driver` is what a probe found before.

    A TensorRT that has a plan of every graph that a render needs; else ONNX Runtime on the GPU,
    where it has its CUDA provider; else ONNX Runtime on the CPU. Never raises for want of a GPU.
    """
    try:
        gpu = find_gpu(device, driver)
    except RuntimeUnavailableError as error:
        return Choice(_CPU, f"there is no GPU to use: {error}")
    reasons = []
    for flavour in installed_flavours() if bundle else []:
        assert bundle is not None
        reason = _why_not(bundle, flavour, gpu)
        if reason is None:
            return Choice(flavour, f"it has plans of every graph for the {gpu.name}")
        reasons.append(f"not {flavour}: {reason}")
    if _has_cuda_provider():
        why = f"its CUDA provider runs on the {gpu.name}"
        return Choice(_CUDA, "; ".join([why, *reasons]))
    reasons.append(f"not {_CUDA}: the installed ONNX Runtime has no CUDA provider")
    return Choice(_CPU, "; ".join(["it runs everywhere", *reasons]))


def _why_not(bundle: Bundle, flavour: Flavour, gpu: Gpu) -> str | None:
    """Why a flavour cannot render a bundle on a GPU; None where it can."""
    from meancache_trt.engine.tensorrt.library import load_library  # noqa: PLC0415
    from meancache_trt.engine.tensorrt.needs import check_plans  # noqa: PLC0415

    try:
        check_plans(bundle, load_library(flavour), gpu.compute_capability)
    except (PlanError, RuntimeUnavailableError) as error:
        return str(error)
    return None


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime  # noqa: PLC0415  (an optional dependency)
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _flavour(backend: str) -> Flavour:
    return next(flavour for flavour in FLAVOURS if flavour == backend)


@dataclass(frozen=True)
class BackendState:
    """A backend, whether it can run here, and why or why not in a few words."""

    name: str
    is_available: bool
    state: str


def available_backends(driver: Driver | None = None) -> list[BackendState]:
    """Every backend of this version, in the order in which "auto" tries them.

    `driver` is what a probe found before.
    """
    try:
        find_gpu(0, driver)
    except RuntimeUnavailableError as error:
        problem: str | None = f"no GPU: {str(error).partition('; use')[0]}"
    else:
        problem = None
    return [
        *(_tensorrt_state(flavour, problem) for flavour in FLAVOURS),
        _cuda_state(problem),
        _cpu_state(),
    ]


def _tensorrt_state(flavour: Flavour, problem: str | None) -> BackendState:
    if flavour not in installed_flavours():
        problem = f"{flavour} is not installed: pip install 'meancache-trt[{EXTRAS[flavour]}]'"
    return BackendState(flavour, problem is None, problem or "ready, for bundles with plans for it")


def _cuda_state(problem: str | None) -> BackendState:
    if not _has_cuda_provider():
        problem = (
            "ONNX Runtime with its CUDA provider is not installed: pip install onnxruntime-gpu"
        )
    return BackendState(_CUDA, problem is None, problem or "ready")


def _cpu_state() -> BackendState:
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            return BackendState(_CPU, is_available=True, state=f"ONNX Runtime {version} on the CPU")
    missing = "onnxruntime is not installed: pip install 'meancache-trt[cpu]'"
    return BackendState(_CPU, is_available=False, state=missing)
