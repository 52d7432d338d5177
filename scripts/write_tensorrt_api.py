"""Write tests/engine/tensorrt/api.json: names of TensorRT's Python interface, by version.

`tensorrt_rtx` is asked as it is installed. Of `tensorrt`, whose libraries are on no package index,
the names are read from the pybind11 sources in a git clone of its repository:

    .venv/bin/python scripts/write_tensorrt_api.py CLONE 10.16=5302b288 11.1=82d1dca8
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

TARGET = Path(__file__).parents[1] / "tests" / "engine" / "tensorrt" / "api.json"
SOURCES = (
    *("python/src/infer/pyCore.cpp", "python/src/infer/pyGraph.cpp"),
    *("python/src/infer/pyFoundationalTypes.cpp", "python/src/parsers/pyOnnx.cpp"),
)
CLASSES = (
    *("Builder", "IBuilderConfig", "INetworkDefinition", "ITensor", "IOptimizationProfile"),
    *("OnnxParser", "ParserError", "IProgressMonitor", "ITimingCache", "IHostMemory"),
    *("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache"),
    *("BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType", "DataType"),
    *("ComputeCapability", "HardwareCompatibilityLevel", "TilingOptimizationLevel"),
    *("ExecutionContextAllocationStrategy", "TensorIOMode", "EngineValidity"),
    *("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "ProfilingVerbosity"),
)
_BINDING = re.compile(r'py::(?:class_|enum_)<.*?\(\s*m,\s*"(\w+)"', re.DOTALL)
_MEMBER = re.compile(
    r'\.(?:def|def_property|def_property_readonly|def_readwrite|value)\(\s*"(\w+)"'
)


def main() -> None:
    """Read both flavours and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clone", type=Path, help="a git clone of NVIDIA/TensorRT")
    parser.add_argument("versions", nargs="+", help="VERSION=COMMIT")
    given = parser.parse_args()
    table = {"tensorrt_rtx": _installed()}
    for version in given.versions:
        name, commit = version.split("=")
        table[f"tensorrt {name}"] = _bound(given.clone, commit)
    TARGET.write_text(json.dumps(table, indent=1) + "\n")


def _installed() -> dict[str, list[str]]:
    import tensorrt_rtx  # noqa: PLC0415  (only here)

    return {name: members(tensorrt_rtx, name) for name in CLASSES if hasattr(tensorrt_rtx, name)}


def members(library: ModuleType, name: str) -> list[str]:
    """Public members of a class of the interface."""
    return _public(dir(getattr(library, name)))


def _bound(clone: Path, commit: str) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for path in SOURCES:
        text = subprocess.run(
            ["git", "-C", str(clone), "show", f"{commit}:{path}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        starts = [*_BINDING.finditer(text), None]
        for start, end in itertools.pairwise(starts):
            assert start is not None
            body = text[start.end() : end.start() if end else None]
            names[start.group(1)] = _public(_MEMBER.findall(body))
    return {name: names[name] for name in CLASSES if name in names}


def _public(names: list[str]) -> list[str]:
    return sorted({name for name in names if not name.startswith("_")} - {"name", "value"})


if __name__ == "__main__":
    main()
