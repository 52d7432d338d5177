"""The C++ part configures with what is there, and says what is left out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from scripts.host.building import ROOT, missing


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tools() -> None:
    lacking = missing()
    if lacking:
        pytest.skip(f"the C++ host needs {', '.join(lacking)}; scripts/install says how")


@pytest.mark.usefixtures("tools")
def test_without_any_backend_it_configures_and_says_what_is_left_out(tmp_path: Path) -> None:
    """tests/host builds it with OpenVINO."""
    configured = run(
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path / "build"),
        "-DMEANCACHE_TRT_OPENVINO=OFF",
        cwd=tmp_path,
    )
    assert "left out: OpenVINO" in configured
    assert "TensorRT" in configured.split("left out:")[1]


@pytest.mark.usefixtures("tools")
def test_a_backend_that_is_asked_for_and_missing_stops_with_what_to_set(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *("cmake", "-S", str(ROOT), "-B", str(tmp_path / "build")),
            *("-DMEANCACHE_TRT_OPENVINO=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_OpenVINO=ON"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "site-packages/openvino/cmake" in " ".join(done.stderr.split())
