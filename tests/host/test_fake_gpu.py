"""The TensorRT backend from plan to picture, with a driver and a TensorRT of our own.

Everything of the backend is real; kernels are OpenVINO's, on the CPU. Built where NVIDIA's headers
are at hand, as `test_tensorrt` is: they say what TensorRT's classes are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from scripts.host.building import ROOT, build, openvino_folder, run

from meancache_trt.bundle import Bundle
from tests.fakes.plans import add_plan
from tests.host.conftest import Host, Subject, require_tools

STUBS = {
    "VRuntime": "RuntimeStub",
    "VCudaEngine": "EngineStub",
    "VExecutionContext": "ContextStub",
}


def stubs(header: str) -> str:
    """Classes whose functions abort, for all pure virtual ones of NvInferImpl.h."""
    lines = ["#include <cstdlib>", "using namespace nvinfer1;"]
    for name, stub in STUBS.items():
        body = re.search(rf"^class {name} : public VRoot\n\{{(.*?)^\}};", header, re.DOTALL | re.M)
        assert body is not None, name
        functions = re.findall(r"virtual (.*?) = 0;", body[1], re.DOTALL)
        lines.append(f"class {stub} : public apiv::{name} {{\n public:")
        lines += [f"  {' '.join(function.split())} override {{ std::abort(); }}" for function in functions]  # fmt: skip  # noqa: E501
        lines.append("};")
    return "\n".join(lines) + "\n"


def build_tensorrt(folder: Path, include: list[Path]) -> Path:
    """Compile fake_tensorrt.cpp; what TensorRT's library would be."""
    (openvino,) = (openvino_folder() or folder).parent.glob("libs/libopenvino.so.*")
    folder.mkdir(exist_ok=True)
    header = (include[0] / "NvInferImpl.h").read_text()
    (folder / "stubs.hpp").write_text(stubs(header))
    library = folder / "libnvinfer.so.11"
    folders = [*include, openvino.parents[1] / "include"]
    run(
        "c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}",
        "-I", folder, *(part for place in folders for part in ("-isystem", place)),
        ROOT / "tests/host/fake_tensorrt.cpp", "-o", library,
        openvino, f"-Wl,-rpath,{openvino.parent}", "-ldl",
    )  # fmt: skip
    return library


@pytest.fixture(scope="module")
def fake_host() -> Host:
    """The host with TensorRT's backend, on our own library."""
    require_tools()
    for name in ("TENSORRT_ROOT", "CUDA_PATH"):
        if name not in os.environ:
            pytest.skip(f"NVIDIA's headers are not at hand: {name} is not set (CONTRIBUTING)")
    if openvino_folder() is None:
        pytest.skip("the kernels here are those of the wheel of OpenVINO, which is not installed")
    include = [Path(os.environ[name]) / "include" for name in ("TENSORRT_ROOT", "CUDA_PATH")]
    if "define TRT_MAJOR_RTX " in (include[0] / "NvInferVersion.h").read_text():
        pytest.skip("our own TensorRT is one of TensorRT's headers, found those of RTX")
    built = Host(ROOT / "build" / "host-fake-gpu")
    built.build.mkdir(parents=True, exist_ok=True)
    with FileLock(built.build / ".lock"):
        library = build_tensorrt(built.build / "tensorrt", include)
        options = [
            "-DCMAKE_BUILD_TYPE=Debug",
            "-DMEANCACHE_TRT_TENSORRT=ON",
            "-DBUILD_SHARED_LIBS=ON",
            f"-DOpenVINO_DIR={openvino_folder()}",
            f"-DTensorRT_LIBRARY={library}",
        ]
        build(built.build, options)
    return built


def version() -> str:
    """What our own library calls itself: the version of the headers."""
    header = Path(os.environ["TENSORRT_ROOT"]) / "include" / "NvInferVersion.h"
    numbers = re.findall(
        r"define (?:TRT_\w+_ENTERPRISE|NV_TENSORRT_(?:MAJOR|MINOR|PATCH|BUILD)) (\d+)",
        header.read_text(),
    )
    return ".".join(numbers[:4])


@pytest.fixture(scope="module")
def said(
    fake_host: Host, flux: Subject, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fake-gpu")
    shutil.copytree(flux.bundle, folder / "a.mcb", copy_function=os.link)
    bundle = Bundle.open(folder / "a.mcb")
    for name, component in bundle.export.components.items():
        if component.precision == "float32":
            add_plan(bundle, name, flavour="tensorrt", version=version())
    flux.conditioning.save(folder / "prompt.safetensors")
    library = fake_host.build / "engine/host/libmeancache_trt.so"
    driver = fake_host.build / "engine/host/tests/fake_driver"
    done = subprocess.run(
        [sys.executable, "-m", "tests.host.fake_gpu", library, bundle.directory,
         folder / "prompt.safetensors"],
        cwd=ROOT, env={**os.environ, "LD_LIBRARY_PATH": str(driver)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_is_chosen_where_there_is_a_plan_of_every_graph(said: dict[str, Any]) -> None:
    assert said["backend"] == "tensorrt"


def test_every_run_gives_what_openvino_gives(said: dict[str, Any]) -> None:
    """The bits: kernels are the same, on tensors in the same order."""
    assert said["differences"] == [0.0, 0.0, 0.0]
    assert said["pixels"] == 0.0


def test_the_loop_runs_plainly_once_and_then_as_one_graph(said: dict[str, Any]) -> None:
    """Six evaluations of two calls, after `prepare`, which has no graph."""
    first, *later = said["logs"]
    assert first.split() == ["run"] * 13
    assert later == [f"run launch({'run' * 12})"] * 2


def test_with_a_callback_each_evaluation_is_a_graph(said: dict[str, Any]) -> None:
    """Two were run before the cancel, and so are captured at once."""
    graph = ["launch(runrun)"]
    first = ["run", *graph * 2, *["run"] * 8]
    assert said["with_callback"].split() == [*first, "run", *graph * 6]


def test_streams_and_memory_of_the_host_are_used(said: dict[str, Any]) -> None:
    assert said["on_stream"] == 0.0
    assert said["default_stream"].startswith("expected a stream of its own, found a default")


def test_a_larger_session_may_move_the_activations(said: dict[str, Any]) -> None:
    assert said["after_other"] == 0.0


def test_sessions_in_threads_give_the_serial_results(said: dict[str, Any]) -> None:
    assert said["threads"] == 0.0


def test_nothing_is_left_on_the_gpu(said: dict[str, Any]) -> None:
    assert said["left"] == {"memory": 0, "graph": 0, "executable": 0}
