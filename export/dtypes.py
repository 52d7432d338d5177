"""NumPy dtype names, which manifests use, as ONNX element types."""

from __future__ import annotations

import onnx_ir as ir

_UNLIKE_NUMPY = {"float32": "FLOAT", "float64": "DOUBLE"}


def onnx_dtype(name: str) -> ir.DataType:
    """The element type for a name such as "float32", "bfloat16" or "int64"."""
    return ir.DataType[_UNLIKE_NUMPY.get(name, name.upper())]
