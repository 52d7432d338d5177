"""Which backend runs here."""

from __future__ import annotations

import contextlib
import importlib.metadata
from dataclasses import dataclass
from typing import Literal, get_args

from meancache_trt.errors import InputError
from meancache_trt.meancache.runtime import Runtime

Backend = Literal["auto", "onnxruntime"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def open_runtime(backend: str = "auto", *, threads: int = 0) -> Runtime:
    """Open a backend; a context manager. "auto" is ONNX Runtime on the CPU in this version.

    Raises:
        InputError: for an unknown name.
        RuntimeUnavailableError: where the backend's package is not installed.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    from meancache_trt.engine.onnxruntime import OnnxRuntime  # noqa: PLC0415  (optional dependency)

    return OnnxRuntime(threads)


@dataclass(frozen=True)
class BackendState:
    """A backend, whether it can run here, and why or why not in a few words."""

    name: str
    is_available: bool
    state: str


def available_backends() -> list[BackendState]:
    """Every backend of this version, in the order in which "auto" tries them."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            state = f"ONNX Runtime {version} on the CPU; this is what auto chooses"
            return [BackendState("onnxruntime", is_available=True, state=state)]
    missing = "onnxruntime is not installed: pip install 'meancache-trt[cpu]'"
    return [BackendState("onnxruntime", is_available=False, state=missing)]
