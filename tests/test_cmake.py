"""The C++ part configures, builds without warnings and passes its own tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tools() -> None:
    for tool in ("cmake", "ctest"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler is installed")


@pytest.mark.usefixtures("tools")
def test_noise_in_cpp_equals_the_golden_file(tmp_path: Path) -> None:
    build = tmp_path / "build"
    configured = run(
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-DMEANCACHE_TRT_WARNINGS_AS_ERRORS=ON",
        cwd=tmp_path,
    )
    assert "not part of this version yet" in configured
    run("cmake", "--build", str(build), cwd=tmp_path)
    passed = run("ctest", "--output-on-failure", "--no-tests=error", cwd=build)
    assert "100% tests passed" in passed
