"""Rotary position embeddings of complex tables, in real numbers: ONNX has no complex ones."""

from __future__ import annotations

import torch
from torch import Tensor


def real(table: Tensor) -> Tensor:
    """Complex (S, D/2) to real (S, D): the cosines, then the sines."""
    return torch.cat([table.real, table.imag], dim=-1)


def rotated(value: Tensor, table: Tensor) -> Tensor:
    """Neighbours of `value` (B, S, heads, D) turned as pairs, in float32, then its dtype again.

    `table` is `real`'s, (S, D) or one of each sample (B, S, D).
    """
    cos, sin = table.unsqueeze(-2).chunk(2, dim=-1)
    first, second = value.float().reshape(*value.shape[:-1], -1, 2).unbind(-1)
    parts = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(parts, dim=-1).flatten(-2).type_as(value)
