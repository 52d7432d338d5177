"""ONNX Runtime's CUDA backend on a fake device: how it binds, orders, captures and ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from meancache_trt.engine.onnxruntime import OnnxRuntime
from meancache_trt.engine.onnxruntime_cuda import OnnxRuntimeCuda, OnnxRuntimeCudaGraph
from meancache_trt.errors import BundleError, RenderError, RuntimeUnavailableError
from meancache_trt.meancache.runtime import Tensor
from tests.fakes.cuda import FakeDevice
from tests.fakes.onnxruntime_cuda import FakeLibrary


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def add_graph(tmp_path: Path) -> Path:
    """y = a + b over (batch, 3)."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "aby"
    ]
    add = helper.make_node("Add", ["a", "b"], ["y"])
    graph = helper.make_graph([add], "add", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "add.onnx")
    return tmp_path / "add.onnx"


def bound(
    runtime: OnnxRuntimeCuda, graph: OnnxRuntimeCudaGraph
) -> tuple[dict[str, Tensor], object]:
    tensors = {name: runtime.tensor(np.ones((2, 3), np.float32)) for name in "aby"}
    return tensors, graph.bind(tensors)


def test_a_call_runs_on_our_stream_when_somebody_waits(device: FakeDevice, add_graph: Path) -> None:
    with OnnxRuntimeCuda(FakeLibrary(device), device) as runtime:
        tensors, call = bound(runtime, runtime.load(add_graph))
        waits = device.waits
        runtime.sequence([call, call]).enqueue()
        assert device.waits == waits
        assert len(runtime.stream.pending) == 2
        assert (tensors["y"].read() == 2).all()


def test_only_repeated_calls_get_a_cuda_graph_each_its_own(
    device: FakeDevice, add_graph: Path
) -> None:
    library = FakeLibrary(device)
    with OnnxRuntimeCuda(library, device) as runtime:
        graph = runtime.load(add_graph)
        (_, one), (_, other) = bound(runtime, graph), bound(runtime, graph)
        for call in (one, one, other, one, other):
            call.enqueue()
        runtime.synchronize()
    assert [number for _, number, _ in library.runs] == ["-1", "1", "-1", "1", "2"]
    assert not any(waits for _, _, waits in library.runs)


def test_a_graph_that_cannot_be_captured_runs_without_and_says_so(
    device: FakeDevice, add_graph: Path
) -> None:
    library = FakeLibrary(device, uncapturable=["add.onnx"])
    with OnnxRuntimeCuda(library, device) as runtime:
        _, call = bound(runtime, runtime.load(add_graph))
        for _ in range(2):
            call.enqueue()
        assert [number for _, number, _ in library.runs] == ["-1", "-1"]
        assert runtime.notes == (
            "add.onnx does not run as a CUDA graph: not all nodes are on the GPU",
        )


def test_float32_is_float32_and_the_stream_is_ours(device: FakeDevice, add_graph: Path) -> None:
    library = FakeLibrary(device)
    external = device.adopt_stream()
    with OnnxRuntimeCuda(library, device, stream=external.handle) as runtime:
        runtime.load(add_graph)
        options = library.options["add.onnx"]
        assert options["use_tf32"] == "0"
        assert options["user_compute_stream"] == str(external.handle)
        assert (runtime.name, runtime.precisions) == ("onnxruntime-cuda", ("float32",))


def test_a_provider_that_does_not_start_is_not_replaced_by_the_cpu(
    device: FakeDevice, add_graph: Path
) -> None:
    with (
        OnnxRuntimeCuda(FakeLibrary(device, starts=False), device) as runtime,
        pytest.raises(RuntimeUnavailableError, match="has a CUDA provider, but it does not start"),
    ):
        runtime.load(add_graph)


def test_what_cannot_be_loaded_is_refused_with_the_librarys_words(
    device: FakeDevice, tmp_path: Path
) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with (
        OnnxRuntimeCuda(FakeLibrary(device), device) as runtime,
        pytest.raises(BundleError, match=r"cannot load .*bad\.onnx"),
    ):
        runtime.load(tmp_path / "bad.onnx")


def test_a_run_that_fails_says_why(device: FakeDevice, add_graph: Path) -> None:
    library = FakeLibrary(device)
    with OnnxRuntimeCuda(library, device) as runtime:
        _, call = bound(runtime, runtime.load(add_graph))
        library.fails = "out of memory"
        with pytest.raises(RenderError, match="ONNX Runtime on the GPU failed: out of memory"):
            call.enqueue()


def test_tensors_of_the_cpu_are_refused(device: FakeDevice, add_graph: Path) -> None:
    with OnnxRuntimeCuda(FakeLibrary(device), device) as runtime, OnnxRuntime(1) as cpu:
        graph = runtime.load(add_graph)
        tensors = {name: cpu.tensor(np.ones((1, 3), np.float32)) for name in "aby"}
        with pytest.raises(RenderError, match="binds tensors of its device, found HostTensor"):
            graph.bind(tensors)


def test_sessions_end_before_their_stream_and_calls_are_refused_then(
    device: FakeDevice, add_graph: Path
) -> None:
    with OnnxRuntimeCuda(FakeLibrary(device), device) as runtime:
        graph = runtime.load(add_graph)
        tensors, call = bound(runtime, graph)
        call.enqueue()
    assert graph._session is None
    for use in (call.enqueue, lambda: graph.bind(tensors), lambda: runtime.load(add_graph)):
        with pytest.raises(RenderError, match="closed"):
            use()
    assert device.order == ["stream", "device"]
