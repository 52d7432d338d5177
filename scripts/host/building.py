"""Build the C++ host from this checkout, for the tests and the proof."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOBS = "2"
TOOLS = ("cmake", "ctest", "ninja", "c++")
HEADERS = {
    "nlohmann/json.hpp": "nlohmann-json3-dev",
    "openssl/evp.h": "libssl-dev",
    "png.h": "libpng-dev",
}
"""What is compiled against, and the Debian package that has it."""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command that has to succeed; returns its output."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def missing() -> list[str]:
    """Tools and Debian packages that the host cannot be built without and that are not here."""
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if "c++" in tools:
        return tools
    return tools + [package for header, package in HEADERS.items() if not _is_found(header)]


def _is_found(header: str) -> bool:
    command = ["c++", "-x", "c++", "-fsyntax-only", "-include", header, os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def openvino_folder() -> Path | None:
    """Where the wheel has OpenVINO's CMake package; None where it is not installed."""
    found = importlib.util.find_spec("openvino")
    return None if found is None or found.origin is None else Path(found.origin).parent / "cmake"


def build(folder: Path, options: Sequence[str], *, source: Path = ROOT) -> None:
    """Configure and build with Ninja; what did not change is not compiled again."""
    run("cmake", "-S", source, "-B", folder, "-G", "Ninja", *options)
    run("cmake", "--build", folder, "--parallel", JOBS)


def build_host(folder: Path) -> None:
    """The host with OpenVINO in `folder`, and installed to `folder`/prefix."""
    openvino = openvino_folder()
    if openvino is None:
        raise RuntimeError("the C++ host is built here with the openvino wheel; install dev")
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DMEANCACHE_TRT_WARNINGS_AS_ERRORS=ON",
        "-DMEANCACHE_TRT_OPENVINO=ON",
        "-DCMAKE_INSTALL_LIBDIR=lib",
        f"-DOpenVINO_DIR={openvino}",
    ]
    build(folder, options)
    run("cmake", "--install", folder, "--prefix", folder / "prefix", "--strip")
