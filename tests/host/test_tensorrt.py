"""The C++ host with its TensorRT backend, as far as it goes without a GPU.

It is built where the environment names NVIDIA's headers, in the variables that CMake reads itself:
TENSORRT_ROOT for TensorRT's and CUDA_PATH for CUDA's. The library is that of the folder, or of the
wheel of TensorRT for RTX. CONTRIBUTING says where to get all of it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from scripts.host.building import ROOT, build, openvino_folder, run
from scripts.host.memory import valgrind

from meancache_trt.engine.native import NativeBundle, NativeLibrary
from meancache_trt.engine.probe import probe
from meancache_trt.errors import RuntimeUnavailableError
from tests.host.conftest import Host, Subject, require_tools

NO_DRIVER = "expected an NVIDIA GPU, but there is no NVIDIA driver (libcuda.so.1 is not found); use"


def wheel_library() -> list[str]:
    """The option that names the library of the wheel, where it is installed."""
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or found.origin is None:
        return []
    return [f"-DTensorRT_LIBRARY={Path(found.origin).parent / 'libtensorrt_rtx.so.1'}"]


@pytest.fixture(scope="module")
def tensorrt_host() -> Host:
    """The host with every backend, warnings as errors, tested by CTest."""
    require_tools()
    for name in ("TENSORRT_ROOT", "CUDA_PATH"):
        if name not in os.environ:
            pytest.skip(f"NVIDIA's headers are not at hand: {name} is not set (CONTRIBUTING)")
    has_library = (Path(os.environ["TENSORRT_ROOT"]) / "lib").is_dir()
    built = Host(ROOT / "build" / "host-tensorrt")
    built.build.mkdir(parents=True, exist_ok=True)
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DMEANCACHE_TRT_WARNINGS_AS_ERRORS=ON",
        "-DMEANCACHE_TRT_TENSORRT=ON",
        f"-DOpenVINO_DIR={openvino_folder()}",
        *([] if has_library else wheel_library()),
    ]
    with FileLock(built.build / ".lock"):
        build(built.build, options)
    return built


@pytest.fixture(scope="module")
def tensorrt_library(tensorrt_host: Host) -> NativeLibrary:
    return NativeLibrary(tensorrt_host.build / "engine" / "host" / "libmeancache_trt.so")


def flavour_of(library: NativeLibrary) -> str:
    (name,) = [name for name in library.backends if name.startswith("tensorrt")]
    return name


def test_ctest_passes_with_tensorrt(tensorrt_host: Host) -> None:
    passed = run("ctest", "--output-on-failure", "--no-tests=error", cwd=tensorrt_host.build)
    assert "100% tests passed" in passed
    assert "tensorrt" in passed


def test_it_is_tried_before_openvino(tensorrt_library: NativeLibrary) -> None:
    assert tensorrt_library.backends[0] == flavour_of(tensorrt_library)


def test_the_driver_is_not_linked(tensorrt_host: Host) -> None:
    """So that the library opens where there is none."""
    if shutil.which("readelf") is None:
        pytest.skip("binutils' readelf lists what a library needs; it is not installed")
    library = tensorrt_host.build / "engine" / "host" / "libmeancache_trt.so"
    needed = [line for line in run("readelf", "-d", library).splitlines() if "(NEEDED)" in line]
    assert any("libtensorrt_rtx" in line or "libnvinfer" in line for line in needed)
    assert not any("libcuda" in line for line in needed)


def test_without_a_driver_it_is_said_at_once(
    tensorrt_library: NativeLibrary, flux: Subject
) -> None:
    if probe().gpus:
        pytest.skip("there is a GPU here")
    with (
        NativeBundle(flux.bundle, library=tensorrt_library) as bundle,
        pytest.raises(RuntimeUnavailableError) as raised,
    ):
        bundle.session(backend=flavour_of(tensorrt_library))
    assert str(raised.value).startswith(NO_DRIVER)


def test_a_library_of_other_headers_is_refused(
    tensorrt_host: Host, tensorrt_library: NativeLibrary, flux: Subject
) -> None:
    """Such as TensorRT's headers with the library of RTX. The driver is one of our own."""
    header = Path(os.environ["TENSORRT_ROOT"]) / "include" / "NvInferVersion.h"
    flavour = flavour_of(tensorrt_library)
    if ("define TRT_MAJOR_RTX " in header.read_text()) == (flavour == "tensorrt_rtx"):
        pytest.skip("the library and the headers belong together here")
    tests = tensorrt_host.build / "engine/host/tests"
    done = subprocess.run(
        [tests / "cycles", flux.bundle, "1", flavour],
        env={**os.environ, "LD_LIBRARY_PATH": str(tests / "fake_driver")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"expected {flavour} ")
    assert ", whose headers this was compiled with, found the library " in done.stderr


def test_openvino_renders_beside_it(tensorrt_library: NativeLibrary, flux: Subject) -> None:
    """Where no backend is named, too: the first that runs here."""
    if "openvino" not in tensorrt_library.backends:
        pytest.skip("the wheel of OpenVINO is not installed")
    if probe().gpus:
        pytest.skip("there is a GPU here")
    with NativeBundle(flux.bundle, library=tensorrt_library) as bundle:
        latents = []
        for backend in (None, "openvino"):
            with bundle.session("b6", backend=backend, threads=1) as session:
                assert session.info["backend"] == "openvino"
                session.set_conditioning(flux.tensors)
                latents.append(session.run(seeds=[1]))
    np.testing.assert_array_equal(latents[0], latents[1])


def test_valgrind_finds_nothing_where_there_is_no_driver(
    tensorrt_host: Host, tensorrt_library: NativeLibrary, flux: Subject
) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    if probe().gpus:
        pytest.skip("there is a GPU here")
    program = tensorrt_host.build / "engine/host/tests/cycles"
    found = valgrind(program, flux.bundle, "1", flavour_of(tensorrt_library))
    assert found.status == 1, found.report[-4000:]  # valgrind's own is 9
    assert NO_DRIVER in found.report


def test_clang_finds_nothing_to_warn_of(tensorrt_host: Host) -> None:
    """Only what includes NVIDIA's headers; the rest is compiled by clang with the fuzzers."""
    if shutil.which("clang++") is None:
        pytest.skip("clang is not installed")
    headers = [str(Path(os.environ[name]) / "include") for name in ("TENSORRT_ROOT", "CUDA_PATH")]
    for source in ("cuda.cpp", "device_tensor.cpp", "library.cpp", "tensorrt_backend.cpp"):
        command = [
            "clang++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow",
            "-Wconversion", "-Werror", "-DMEANCACHE_TRT_TENSORRT_FLAVOUR=\"tensorrt_rtx\"",
            *(part for folder in headers for part in ("-isystem", folder)),
            f"-I{ROOT / 'engine/host'}", f"-I{ROOT / 'engine/include'}",
            str(ROOT / "engine/host/tensorrt" / source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
