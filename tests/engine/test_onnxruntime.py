from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from meancache_trt.engine.onnxruntime import OnnxRuntime
from meancache_trt.engine.select import BACKENDS, available_backends, open_runtime
from meancache_trt.errors import BundleError, InputError, RenderError


@pytest.fixture
def add_graph(tmp_path: Path) -> Path:
    """y = a + b over (batch, 3)."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "aby"
    ]
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["y"])], "add", values[:2], values[2:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "add.onnx")
    return tmp_path / "add.onnx"


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_a_bound_call_reads_and_writes_its_tensors_in_place(add_graph):
    with OnnxRuntime() as runtime:
        a, b, y = (
            runtime.tensor(ones(2, 3)),
            runtime.zeros((2, 3), "float32"),
            runtime.tensor(ones(2, 3)),
        )
        call = runtime.load(add_graph).bind({"a": a, "b": b, "y": y})
        for value in (1.0, 5.0):
            b.write(np.full((2, 3), value, np.float32))
            call.enqueue()
            assert np.array_equal(y.read(), ones(2, 3) + value)


def test_a_view_shares_memory(add_graph):
    with OnnxRuntime() as runtime:
        flat = runtime.tensor(np.arange(6, dtype=np.float32))
        y = runtime.zeros((2, 3), "float32")
        view = flat.view((2, 3))
        runtime.load(add_graph).bind({"a": view, "b": view, "y": y}).enqueue()
        assert np.array_equal(y.read().ravel(), 2 * flat.read())


def test_memory_of_another_library_is_read_and_written_in_place(add_graph):
    with OnnxRuntime() as runtime:
        a, y = torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3)
        tensors = {name: runtime.from_dlpack(value) for name, value in (("a", a), ("y", y))}
        assert tensors["a"].array.ctypes.data == a.data_ptr()
        call = runtime.load(add_graph).bind({**tensors, "b": tensors["a"]})
        for _ in range(2):
            a += 1
            call.enqueue()
            assert torch.equal(y, 2 * a)


def test_memory_of_another_library_lives_as_long_as_the_tensor(add_graph):
    with OnnxRuntime() as runtime:
        tensor = runtime.from_dlpack(torch.full((1000,), 7.0))
        gc.collect()
        others = [torch.zeros(1000) for _ in range(100)]  # would take the memory, were it free
        assert (tensor.read() == 7).all()
        assert len(others) == 100


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(4, 6).T, "takes contiguous memory, found strides"),
        (torch.ones(2, dtype=torch.bfloat16), "host memory by DLPack, found Tensor"),
        (torch.ones(2, device="meta"), "host memory by DLPack, found Tensor"),
        ([1.0, 2.0], "host memory by DLPack, found list"),
    ],
)
def test_memory_that_it_cannot_take_is_refused(value, message):
    with OnnxRuntime() as runtime, pytest.raises(RenderError, match=message):
        runtime.from_dlpack(value)


def test_a_sequence_runs_in_order(add_graph):
    with OnnxRuntime() as runtime:
        graph = runtime.load(add_graph)
        a, b, c = (runtime.tensor(ones(1, 3)) for _ in range(3))
        calls = [graph.bind({"a": a, "b": a, "y": b}), graph.bind({"a": b, "b": b, "y": c})]
        runtime.sequence(calls).enqueue()
        assert np.array_equal(c.read(), 4 * ones(1, 3))


def test_binding_names_what_is_missing_and_unknown(add_graph):
    with OnnxRuntime() as runtime:
        tensors = {"a": runtime.tensor(ones(1, 3)), "q": runtime.tensor(ones(1, 3))}
        with pytest.raises(RenderError, match=r"missing \['b', 'y'\], unknown \['q'\]"):
            runtime.load(add_graph).bind(tensors)


@pytest.mark.parametrize("wrong", [ones(1, 4), ones(3), np.ones((1, 3), np.float64)])
def test_binding_refuses_a_wrong_shape_or_dtype(add_graph, wrong):
    with OnnxRuntime() as runtime:
        tensors = {"a": runtime.tensor(wrong), "b": runtime.tensor(ones(1, 3))}
        with pytest.raises(RenderError, match=r"tensor 'a' is float32 of shape \('batch', 3\)"):
            runtime.load(add_graph).bind({**tensors, "y": runtime.tensor(ones(1, 3))})


def test_writing_refuses_another_shape():
    with OnnxRuntime() as runtime, pytest.raises(RenderError, match=r"shape \(2, 3\), found"):
        runtime.zeros((2, 3), "float32").write(ones(3, 2))


def test_a_file_that_is_no_graph_is_refused_with_the_librarys_words(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with OnnxRuntime() as runtime, pytest.raises(BundleError, match=r"cannot load .*bad\.onnx"):
        runtime.load(tmp_path / "bad.onnx")


def test_an_unknown_backend_is_refused():
    with pytest.raises(InputError, match="expected one of auto, onnxruntime"):
        open_runtime("cuda")


def test_the_machine_lists_its_backends():
    states = {state.name: state for state in available_backends()}
    assert {"auto", *states} == set(BACKENDS)
    assert states["onnxruntime"].is_available
    assert "ONNX Runtime" in states["onnxruntime"].state
