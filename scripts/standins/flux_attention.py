"""A training-time attention for FLUX; saved pipelines keep diffusers' own."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, apply_rotary_emb
from torch import Tensor


class MatmulFluxAttention:
    """FLUX attention by explicit products: its CPU backward takes half the time of SDPA's."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends over text tokens, where the block is double, followed by image tokens."""
        assert attention_mask is None, "FLUX attends everywhere"
        parts = [_image_heads(attn, hidden_states)]
        if encoder_hidden_states is not None:
            parts.insert(0, _text_heads(attn, encoder_hidden_states))
        query, key, value = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        mixed = _attend(query, key, value)
        if encoder_hidden_states is None:
            return mixed
        text_length = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, text_length:]), attn.to_add_out(mixed[:, :text_length])


def _heads(attn: FluxAttention, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (-1, attn.head_dim))


def _image_heads(attn: FluxAttention, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_heads(attn, proj(states)) for proj in (attn.to_q, attn.to_k, attn.to_v))
    return attn.norm_q(query), attn.norm_k(key), value


def _text_heads(attn: FluxAttention, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    query, key, value = (_heads(attn, proj(states)) for proj in projections)
    return attn.norm_added_q(query), attn.norm_added_k(key), value


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
