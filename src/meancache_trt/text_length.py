"""Which of a bundle's text lengths a picture is rendered at, and its conditioning at that length.

Padding costs attention and changes nothing where a mask keeps the network from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.conditioning import Conditioning
from meancache_trt.manifest import Exported

Tensors = dict[str, NDArray[Any]]


def cut_to_bucket(export: Exported, conditioning: Conditioning) -> tuple[int, Tensors]:
    """The shortest text length that holds all of `conditioning`'s prompts, and its tensors at it.

    `conditioning` has the full length, `export.text_tokens`. That is also what is returned where
    the network has no mask, or one that is not true for the first tokens alone.
    """
    length = _length(export, conditioning)
    if length == export.text_tokens:
        return length, dict(conditioning.tensors)
    axes = {
        name: record.shape.index("text_tokens")
        for name, record in export.components["transformer"].inputs.items()
        if "text_tokens" in record.shape
    }
    return length, {
        name: _cut(tensor, axes[name], length) if name in axes else tensor
        for name, tensor in conditioning.tensors.items()
    }


def _length(export: Exported, conditioning: Conditioning) -> int:
    inputs = export.components["transformer"].inputs
    masks = [
        tensor
        for name, tensor in conditioning.tensors.items()
        if name in inputs and inputs[name].role == "text_mask"
    ]
    used = max(map(_used, masks), default=export.text_tokens)
    return min(length for length in export.text_lengths if length >= used)


def _used(mask: NDArray[Any]) -> int:
    """How many tokens of (B, tokens) the longest prompt has; all where a prompt has a gap."""
    is_used = mask != 0
    has_gap = bool((is_used[:, 1:] & ~is_used[:, :-1]).any())
    return int(is_used.shape[1] if has_gap else is_used.sum(axis=1).max())


def _cut(tensor: NDArray[Any], axis: int, length: int) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.take(range(length), axis=axis))
