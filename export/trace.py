"""Modules without weights to ONNX graphs, traced with every declared dimension dynamic."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meancache_trt.errors import ExportError
from meancache_trt.export.dtypes import onnx_dtype
from meancache_trt.export.family import Signature
from meancache_trt.manifest import TensorRecord


def build_network(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers model from its configuration, what checkpoints store of it on the meta device.

    That is parameters and buffers, in float32. Buffers and constants that the model computes for
    itself hold their real values.
    """
    with init_empty_weights(include_buffers=False):
        network: nn.Module = getattr(diffusers, class_name).from_config(dict(config))
    stored = network.state_dict()
    for name, buffer in list(network.named_buffers()):
        if name in stored:
            owner, _, own_name = name.rpartition(".")
            setattr(network.get_submodule(owner), own_name, buffer.to("meta"))
    return network.eval().requires_grad_(False)


def cast_stored(network: nn.Module, dtype: str) -> nn.Module:
    """Give what is on the meta device `dtype`, in place.

    But for indices and counts, and what diffusers keeps in float32 in any dtype.
    """
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        is_kept = kept.intersection(name.split("."))
        if tensor.is_meta and tensor.is_floating_point() and not is_kept:
            tensor.data = tensor.data.to(getattr(torch, dtype))
    return network


def trace(
    module: nn.Module, signature: Signature, symbols: Mapping[str, int], *, opset: int
) -> ir.Model:
    """The graph of `module`, whose `forward` takes the signature's inputs by name.

    `symbols` are the sizes that it is traced at; two symbols should not be equal by accident.
    Parameters on the meta device become initialisers without values. Raises `ExportError` where
    the graph's inputs or outputs are not those of the signature, fixed and dynamic dimensions
    included.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad(), _quiet():
            _fake_weights(module)
            model = _export(module, signature, symbols, opset)
    except Exception as error:  # torch's exporter raises whatever its passes raise
        raise ExportError(
            f"torch {torch.__version__} with diffusers {diffusers.__version__} cannot export "
            f"{type(module).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    _name_dimensions(model, signature)
    _strip_metadata(model)
    return model


def _export(
    module: nn.Module, signature: Signature, symbols: Mapping[str, int], opset: int
) -> ir.Model:
    program = torch.export.export(
        module,
        (),
        {name: _example(record, symbols) for name, record in signature.inputs.items()},
        dynamic_shapes={name: _dynamic(r) for name, r in signature.inputs.items()},
        strict=False,
    )
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        output_names=list(signature.outputs),
        optimize=False,
        verbose=False,
    )
    assert exported is not None
    return exported.model


def _fake_weights(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _example(record: TensorRecord, symbols: Mapping[str, int]) -> torch.Tensor:
    return torch.empty(record.resolved(symbols), dtype=getattr(torch, record.dtype))


def _dynamic(record: TensorRecord) -> dict[int, Any]:
    dynamic = torch.export.Dim.DYNAMIC
    return {axis: dynamic for axis, extent in enumerate(record.shape) if isinstance(extent, str)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch's exporter says about itself; what it makes is checked by us."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _name_dimensions(model: ir.Model, signature: Signature) -> None:
    graph = model.graph
    _check_tensors("inputs", graph.inputs, signature.inputs)
    _check_tensors("outputs", graph.outputs, signature.outputs)
    for values, records in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs)):
        for value in values:
            value.shape = ir.Shape(records[value.name or ""].shape)


def _check_tensors(kind: str, values: list[ir.Value], records: Mapping[str, TensorRecord]) -> None:
    names = [value.name for value in values]
    if sorted(map(str, names)) != sorted(records):
        raise ExportError(f"the graph's {kind} are {names}; expected {list(records)}")
    for value in values:
        record = records[value.name or ""]
        found = tuple("dynamic" if isinstance(d, ir.SymbolicDim) else d for d in value.shape or ())
        expected = tuple("dynamic" if isinstance(d, str) else d for d in record.shape)
        if found != expected or value.dtype != onnx_dtype(record.dtype):
            raise ExportError(
                f"the exporter gave {value.name} {value.dtype} of shape {found}; expected "
                f"{expected} and {record.dtype}: a size was baked into the graph"
            )


def _strip_metadata(model: ir.Model) -> None:
    # torch records stack traces, which are large and name the exporting machine's paths.
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
