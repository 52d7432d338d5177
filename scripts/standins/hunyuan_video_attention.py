"""A training-time attention for HunyuanVideo; saved pipelines keep diffusers' own."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from matmul_attention import Heads, attend, joined, stream_heads, text_heads
from torch import Tensor
from torch.nn.functional import pad


class MatmulHunyuanVideoAttention:
    """HunyuanVideo's attention by explicit products."""

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
        mixed = attend(query, key, value, attention_mask)
        video, words = mixed[:, :-text_length], mixed[:, -text_length:]
        if attn.add_q_proj is None:
            return video, words
        return attn.to_out[0](video), attn.to_add_out(words)


def _heads(attn: Attention, video: Tensor, text: Tensor) -> Heads:
    """Heads of both streams; double blocks project each by itself."""
    if attn.add_q_proj is None:
        return stream_heads(attn, torch.cat([video, text], 1))
    return joined(stream_heads(attn, video), text_heads(attn, text))
