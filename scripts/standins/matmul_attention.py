"""Attention by explicit products: on a CPU its backward takes half the time of SDPA's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Heads = tuple[Tensor, Tensor, Tensor]
"""Query, key and value `(B, N, heads, width)`."""


def stream_heads(attn: Any, states: Tensor) -> Heads:
    """Heads of the image's or video's tokens, or of all tokens in a single block."""
    query, key, value = _split(attn, states, (attn.to_q, attn.to_k, attn.to_v))
    return attn.norm_q(query), attn.norm_k(key), value


def text_heads(attn: Any, states: Tensor) -> Heads:
    """Heads of the text's tokens in a double block."""
    query, key, value = _split(attn, states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    return attn.norm_added_q(query), attn.norm_added_k(key), value


def joined(*parts: Heads) -> Heads:
    """One stream behind the other."""
    query, key, value = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mixed values `(B, N, heads * width)`; a mask `(B, 1, 1, N)` says which keys count."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)


def _split(attn: Any, states: Tensor, projections: tuple[torch.nn.Module, ...]) -> Heads:
    query, key, value = (part(states).unflatten(-1, (attn.heads, -1)) for part in projections)
    return query, key, value
