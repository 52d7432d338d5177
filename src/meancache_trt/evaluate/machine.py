"""What an evaluation ran on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

from meancache_trt.calibration.evaluation import Machine

_PACKAGES = ("meancache-trt", "onnxruntime", "torch", "diffusers", "numpy", "scikit-image")


def describe_machine() -> Machine:
    """This machine and the packages that were at work."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        system=platform.platform(),
        versions=versions,
    )


def _processor() -> str:
    """The processor's name as Linux tells it, or what Python knows elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
