"""An ONNX graph as TensorRT's network definition: parsed, described, given its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meancache_trt.engine.tensorrt.library import ErrorLog, Library
from meancache_trt.engine.tensorrt.record import PlanTensor, ShapeRange
from meancache_trt.errors import PlanError

NO_DRIVER = "cudaError 35"
"""What TensorRT logs beside every refusal where there is no driver, which building ahead of time
does not need."""

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}


def parse(library: Library, builder: Any, log: ErrorLog, graph: Path) -> Any:
    """The network of an ONNX file, strongly typed: its precisions are those of the graph.

    Raises `PlanError` with the parser's words.
    """
    network = builder.create_network(_strongly_typed(library))
    parser = library.module.OnnxParser(network, log.logger)
    # By path: the weights beside it are found from there, and protobuf ends at 2 GB.
    if not parser.parse_from_file(str(graph)):
        reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise PlanError(
            f"{library.flavour} {library.version} cannot parse {graph}: "
            f"{'; '.join(reasons) or log.reason(besides=NO_DRIVER)}"
        )
    return network


def _strongly_typed(library: Library) -> int:
    """The flag of TensorRT 10; later versions know no other networks and may lack it."""
    flags = library.module.NetworkDefinitionCreationFlag
    flag = getattr(flags, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def allow_unfused_attention(library: Library, network: Any) -> int:
    """Let each Attention be built of single operations where no fused kernel fits it; how many.

    Otherwise the whole graph is refused: a VAE's attention has one head of all its channels, for
    which there is no kernel. Versions before 10.14 have no such layer and always do so.
    """
    trt = library.module
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [layer for layer in layers if kind is not None and layer.type == kind]
    for layer in found:
        layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as an ILayer
        layer.attention.decomposable = True
    return len(found)


def inputs_of(network: Any) -> dict[str, PlanTensor]:
    """The network's inputs by name."""
    return _described(network.get_input(index) for index in range(network.num_inputs))


def outputs_of(network: Any) -> dict[str, PlanTensor]:
    """The network's outputs by name."""
    return _described(network.get_output(index) for index in range(network.num_outputs))


def _described(tensors: Any) -> dict[str, PlanTensor]:
    return {tensor.name: PlanTensor(_dtype(tensor), tuple(tensor.shape)) for tensor in tensors}


def _dtype(tensor: Any) -> str:
    """NumPy's name of a tensor's element type, or TensorRT's where NumPy has none."""
    name = str(tensor.dtype.name)
    return _DTYPES.get(name, name.lower())


def check_profile(inputs: Mapping[str, PlanTensor], profile: Mapping[str, ShapeRange]) -> None:
    """Raise `PlanError` where a profile does not give shapes that the inputs can have.

    TensorRT refuses them too, but some of them without the input's name.
    """
    unknown = sorted(profile.keys() - inputs.keys())
    if unknown:
        raise PlanError(
            f"expected shapes of the inputs {', '.join(inputs)}, found {', '.join(unknown)}; "
            "leave it out"
        )
    for name, tensor in inputs.items():
        if name in profile:
            _check_range(name, tensor.shape, profile[name])
        elif -1 in tensor.shape:
            raise PlanError(
                f"input {name} is dynamic, {_shape(tensor.shape)}; give its shapes, found those "
                f"of {', '.join(profile) or 'no input'}"
            )


def _check_range(name: str, shape: tuple[int, ...], given: ShapeRange) -> None:
    ends = (given.min, given.opt, given.max)
    text = "/".join(map(_shape, ends))
    if any(len(end) != len(shape) for end in ends):
        raise PlanError(f"input {name} has {len(shape)} axes, {_shape(shape)}; found {text}")
    for size, *values in zip(shape, *ends, strict=True):
        if sorted(values) != values or values[0] < 1:
            raise PlanError(f"shapes of input {name} are MIN/OPT/MAX, ascending; found {text}")
        if size != -1 and set(values) != {size}:
            raise PlanError(f"input {name} is fixed to {_shape(shape)} where not -1; found {text}")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
