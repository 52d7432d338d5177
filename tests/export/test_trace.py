from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meancache_trt.errors import ExportError
from meancache_trt.export.family import Signature
from meancache_trt.export.trace import trace
from meancache_trt.manifest import TensorRecord

SYMBOLS = {"batch": 2, "tokens": 6}


def record(*shape: int | str, dtype: str = "float32") -> TensorRecord:
    return TensorRecord(dtype, shape, "latent")


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.tensor([2.0, 2.0, 2.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table


class Baked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 6, 3) * 2


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, 3).half()


def test_declared_dimensions_keep_their_names_and_constants_their_values() -> None:
    signature = Signature({"x": record("batch", "tokens", 3)}, {"y": record("batch", "tokens", 3)})
    model = trace(Doubled(), signature, SYMBOLS, opset=20)

    assert str(model.graph.inputs[0].shape) == "[batch,tokens,3]"
    assert str(model.graph.outputs[0].shape) == "[batch,tokens,3]"
    (table,) = model.graph.initializers.values()
    assert table.const_value is not None
    assert table.const_value.numpy().tolist() == [2, 2, 2]


def test_graph_names_no_file_of_the_exporting_machine() -> None:
    signature = Signature({"x": record("batch", "tokens", 3)}, {"y": record("batch", "tokens", 3)})
    model = trace(Doubled(), signature, SYMBOLS, opset=20)

    assert not any(node.metadata_props or node.doc_string for node in model.graph)


def test_module_that_bakes_a_size_is_refused() -> None:
    signature = Signature({"x": record("batch", "tokens", 3)}, {"y": record("batch", "tokens", 3)})
    with pytest.raises(ExportError, match=r"cannot export Baked: "):
        trace(Baked(), signature, SYMBOLS, opset=20)


def test_output_of_another_type_is_refused() -> None:
    signature = Signature({"x": record("batch", "tokens", 3)}, {"y": record("batch", "tokens", 3)})
    with pytest.raises(ExportError, match=r"y FLOAT16 of shape .* float32"):
        trace(Halved(), signature, SYMBOLS, opset=20)


def test_fixed_dimension_where_a_dynamic_one_is_declared_is_refused() -> None:
    signature = Signature({"x": record("batch", 6, 3)}, {"y": record("batch", "tokens", 3)})
    with pytest.raises(ExportError, match="a size was baked into the graph"):
        trace(Doubled(), signature, SYMBOLS, opset=20)
