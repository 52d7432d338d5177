from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch._subclasses.fake_tensor import FakeTensorMode

from meancache_trt.errors import ExportError
from meancache_trt.export.optimize import optimize
from meancache_trt.export.safetensors_file import StoredTensor
from meancache_trt.export.weights import (
    count_bytes,
    place,
    place_weights,
    reference_weights,
)
from meancache_trt.manifest import WeightFile


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "blobs" / "0a1b"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


def test_link_shares_the_disk_blocks(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model.safetensors"
    assert place(source, target, "link")
    assert target.samefile(source)


def test_symbolic_link_of_a_hub_snapshot_is_followed(source: Path, tmp_path: Path) -> None:
    entry = tmp_path / "model.safetensors"
    entry.symlink_to("blobs/0a1b")
    target = tmp_path / "out" / "model.safetensors"
    assert place(entry, target, "link")
    assert not target.is_symlink()
    assert target.samefile(source)


def test_copy_stands_alone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model.safetensors"
    assert not place(source, target, "copy")
    assert not target.samefile(source)
    assert target.read_bytes() == b"weights"


def test_copy_over_an_earlier_link_leaves_the_checkpoint_alone(
    source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "model.safetensors"
    place(source, target, "link")
    place(source, target, "copy")
    assert source.read_bytes() == b"weights"
    assert not target.samefile(source)


def refuse_links(monkeypatch: pytest.MonkeyPatch, code: int, kind: str = "link") -> None:
    def link(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, kind, link)


def test_another_file_system_gets_a_symbolic_link(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch, errno.EXDEV)
    target = tmp_path / "out" / "model.safetensors"
    assert place(source, target, "link")
    assert target.readlink() == source.resolve()


def test_file_system_without_links_gets_a_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch, errno.EPERM)
    refuse_links(monkeypatch, errno.EPERM, "symlink")
    target = tmp_path / "out" / "model.safetensors"
    assert not place(source, target, "link")
    assert target.read_bytes() == b"weights"


def test_full_disk_is_not_taken_for_a_missing_feature(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        place(source, tmp_path / "out" / "model.safetensors", "link")


def test_placed_weights_are_recorded_with_size_and_hash(source: Path, tmp_path: Path) -> None:
    (file,) = place_weights([source], tmp_path / "out", "transformer", "link")
    assert file.path == "transformer/0a1b"
    assert file.size_bytes == 7
    # printf weights | sha256sum
    assert file.sha256 == "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert file.is_linked


def model_with_weights() -> ir.Model:
    """x + transpose(a) + transpose(b), with a and b not given any values."""
    nodes = [
        onnx.helper.make_node("Transpose", ["network.a"], ["at"]),
        onnx.helper.make_node("Transpose", ["network.b"], ["bt"]),
        onnx.helper.make_node("Add", ["x", "at"], ["xa"]),
        onnx.helper.make_node("Add", ["xa", "bt"], ["y"]),
    ]
    zeros = np.zeros((2, 2), np.float32)
    graph = onnx.helper.make_graph(
        nodes,
        "weighted",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 2])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 2])],
        [onnx.numpy_helper.from_array(zeros, f"network.{name}") for name in ("a", "b", "unused")],
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


def test_weights_take_the_checkpoints_names_and_are_never_read(tmp_path: Path) -> None:
    nowhere = tmp_path / "no-such-file.safetensors"
    stored = {
        "a": StoredTensor(nowhere, 80, 16, "float32", (2, 2)),
        "b": StoredTensor(nowhere, 96, 8, "bfloat16", (2, 2)),
    }
    model = model_with_weights()

    reference_weights(model, stored)
    optimize(model)

    graph = ir.to_proto(model).graph
    found = {
        weight.name: (weight.data_type, {e.key: e.value for e in weight.external_data})
        for weight in graph.initializer
    }
    location = {"location": nowhere.name}
    assert found == {
        "a": (onnx.TensorProto.FLOAT, {**location, "offset": "80", "length": "16"}),
        "b": (onnx.TensorProto.BFLOAT16, {**location, "offset": "96", "length": "8"}),
    }
    assert [value.name for value in graph.input] == ["x"]
    operations = sorted(node.op_type for node in graph.node)
    assert operations == ["Add", "Add", "Cast", "Transpose", "Transpose"]
    file = WeightFile(f"transformer/{nowhere.name}", 96, "0" * 64, is_linked=True)
    assert count_bytes(model, [file]) == (24, 24)
    assert count_bytes(model, [msgspec.structs.replace(file, is_linked=False)]) == (24, 0)


def test_parameter_that_the_checkpoint_does_not_store_is_refused() -> None:
    model = model_with_weights()
    with FakeTensorMode():
        fake = torch.empty(2, 2)
    model.graph.initializers["network.a"].const_value = TorchTensor(fake, name="network.a")
    with pytest.raises(ExportError, match=r"network\.a has no value"):
        reference_weights(model, {})
