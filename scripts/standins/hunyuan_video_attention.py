"""A training-time attention for HunyuanVideo; saved pipelines keep diffusers' own."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn.functional import pad

Heads = tuple[Tensor, Tensor, Tensor]


class MatmulHunyuanVideoAttention:
    """HunyuanVideo's attention by explicit products, whose CPU backward is faster than SDPA's."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Attends over video tokens followed by the text tokens that the mask leaves."""
        text_length = encoder_hidden_states.shape[1]
        query, key, value = _heads(attn, hidden_states, encoder_hidden_states)
        cosine, sine = image_rotary_emb
        text = (0, 0, 0, text_length)  # is not rotated
        rotation = (pad(cosine, text, value=1.0), pad(sine, text))
        query = apply_rotary_emb(query, rotation, sequence_dim=1)
        key = apply_rotary_emb(key, rotation, sequence_dim=1)
        mixed = _attend(query, key, value, attention_mask)
        video, words = mixed[:, :-text_length], mixed[:, -text_length:]
        if attn.add_q_proj is None:
            return video, words
        return attn.to_out[0](video), attn.to_add_out(words)


def _heads(attn: Attention, video: Tensor, text: Tensor) -> Heads:
    """Query, key and value of both streams, `(B, N, heads, width)`; double blocks project twice."""
    if attn.add_q_proj is None:
        both = torch.cat([video, text], 1)
        query, key, value = (_split(attn, part(both)) for part in (attn.to_q, attn.to_k, attn.to_v))
        return attn.norm_q(query), attn.norm_k(key), value
    query, key, value = (_split(attn, part(video)) for part in (attn.to_q, attn.to_k, attn.to_v))
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_query, text_key, text_value = (_split(attn, part(text)) for part in added)
    return (
        torch.cat([attn.norm_q(query), attn.norm_added_q(text_query)], 1),
        torch.cat([attn.norm_k(key), attn.norm_added_k(text_key)], 1),
        torch.cat([value, text_value], 1),
    )


def _split(attn: Attention, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (attn.heads, -1))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
