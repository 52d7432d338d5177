"""Weights that lie on another file system than their graph: mapped, and bound by name.

There a bundle has symbolic links for weights, which ONNX Runtime does not follow out of the
graph's folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from meancache_trt.errors import RuntimeUnavailableError

_STORED_AS = {"bfloat16": "uint16"}  # what NumPy has no type for


def has_linked_weights(graph: Path) -> bool:
    """Whether weights beside a graph file are symbolic links."""
    return any(file.is_symlink() for file in graph.parent.glob("*.safetensors"))


def mapped_weights(graph: Path, library: Any) -> tuple[list[str], list[Any]]:
    """Names and values of a graph's external initialisers, mapped and not read.

    `library` is onnxruntime, whose `OrtValue`s the values are; they hold the mapping. Raises
    `RuntimeUnavailableError` without the package onnx.
    """
    names, values, files = [], [], {}
    for tensor in _initializers(graph):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            continue
        file = graph.parent / place["location"]
        if file not in files:
            files[file] = np.memmap(file, mode="r")
        start = int(place.get("offset", 0))
        dtype = _dtype(tensor.data_type)
        end = start + math.prod(tensor.dims) * dtype.itemsize
        array = files[file][start:end].view(dtype).reshape(tuple(tensor.dims))
        names.append(tensor.name)
        values.append(library.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type))
    return names, values


def _initializers(graph: Path) -> Any:
    try:
        import onnx  # noqa: PLC0415  (needed for such bundles only)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"the weights of {graph} are symbolic links, which ONNX Runtime takes by name only, "
            "and finding the names needs the package onnx; run `pip install onnx`, "
            "or build the bundle with --weights copy"
        ) from error
    return onnx.load(graph, load_external_data=False).graph.initializer


def _dtype(element_type: int) -> np.dtype[Any]:
    import onnx  # noqa: PLC0415

    name = onnx.TensorProto.DataType.Name(element_type).lower()
    name = {"float": "float32", "double": "float64"}.get(name, name)
    stored: np.dtype[Any] = np.dtype(_STORED_AS.get(name, name))
    return stored
