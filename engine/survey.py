"""What the installed libraries say of themselves, each asked in a process of its own.

A library that is damaged may end the process that imports it, one that is large takes seconds, and
one that waits for a driver may hang: none of them is imported here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

LIBRARIES = ("onnxruntime", "tensorrt", "tensorrt_rtx")
_ANSWERS_IN_S = 10.0  # the data-centre library takes two to three from a cold disk
_LONGEST_PROBLEM = 300  # characters of a library's own words


class LibraryState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A library by the name that is imported; `problem` says why it cannot be.

    `compute_capabilities` are those that a TensorRT builds for; None where it builds for the GPU
    at hand. `providers` are those that an ONNX Runtime was compiled with: they may still lack
    CUDA's libraries here.
    """

    name: str
    version: str | None = None
    problem: str | None = None
    compute_capabilities: tuple[str, ...] | None = None
    providers: tuple[str, ...] = ()


def survey(
    names: Sequence[str] = LIBRARIES, *, timeout_s: float = _ANSWERS_IN_S
) -> dict[str, LibraryState]:
    """Ask every library, all at once; returns within `timeout_s`."""
    asked = {name: _start(name) for name in names if importlib.util.find_spec(name)}
    return {
        name: _answer(name, asked[name], timeout_s)
        if name in asked
        else LibraryState(name, problem="not installed")
        for name in names
    }


def _start(name: str) -> subprocess.Popen[bytes]:
    # By its path, not by its name: that would import this package first. -P keeps the folder of
    # this file, which has an onnxruntime.py, out of the search path.
    command = [sys.executable, "-P", str(Path(__file__)), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _answer(name: str, process: subprocess.Popen[bytes], timeout_s: float) -> LibraryState:
    try:
        said, complaints = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return LibraryState(name, problem=f"installed, but not imported within {timeout_s:g} s")
    if process.returncode == 0:
        return msgspec.json.decode(said, type=LibraryState)
    words = complaints.decode(errors="replace").strip().splitlines()
    last = words[-1][:_LONGEST_PROBLEM] if words else f"exit status {process.returncode}"
    return LibraryState(name, problem=f"installed, but it cannot be imported: {last}")


def _described(name: str) -> dict[str, Any]:
    """What a library says once it is imported."""
    module: Any = importlib.import_module(name)
    described: dict[str, Any] = {"name": name, "version": str(module.__version__)}
    if hasattr(module, "ComputeCapability"):
        members = [member.removeprefix("SM") for member in module.ComputeCapability.__members__]
        numbers = [member for member in members if member.isdecimal()]  # not NONE and CURRENT
        described["compute_capabilities"] = [f"{digits[:-1]}.{digits[-1]}" for digits in numbers]
    if hasattr(module, "get_available_providers"):
        described["providers"] = module.get_available_providers()
    return described


if __name__ == "__main__":
    described_state = _described(sys.argv[1])
    sys.stdout.write(json.dumps(described_state))
