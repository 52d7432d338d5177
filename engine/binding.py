"""What every runtime checks before it fixes the memory of a graph's inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping

from meancache_trt.errors import RenderError
from meancache_trt.meancache.runtime import Tensor, TensorSpec


def check_binding(expected: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    """Raise `RenderError` where names, shapes or element types do not fit."""
    if tensors.keys() != expected.keys():
        missing = sorted(expected.keys() - tensors.keys()) or "nothing"
        unknown = sorted(tensors.keys() - expected.keys()) or "nothing"
        raise RenderError(
            f"a graph binds each of its tensors once: missing {missing}, unknown {unknown}"
        )
    for name, tensor in tensors.items():
        _check(expected[name], tensor)


def _check(spec: TensorSpec, tensor: Tensor) -> None:
    fits = len(spec.shape) == len(tensor.shape) and all(
        isinstance(expected, str) or expected is None or expected == found
        for expected, found in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits or spec.dtype != tensor.dtype:
        raise RenderError(
            f"tensor {spec.name!r} is {spec.dtype} of shape {spec.shape}, found {tensor.dtype} of "
            f"shape {tensor.shape}; the bundle was built for other sizes"
        )
