"""A training-time attention for FLUX; saved pipelines keep diffusers' own."""

from __future__ import annotations

from diffusers.models.transformers.transformer_flux import FluxAttention, apply_rotary_emb
from matmul_attention import attend, joined, stream_heads, text_heads
from torch import Tensor


class MatmulFluxAttention:
    """FLUX attention by explicit products."""

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
        parts = [stream_heads(attn, hidden_states)]
        if encoder_hidden_states is not None:
            parts.insert(0, text_heads(attn, encoder_hidden_states))
        query, key, value = joined(*parts)
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        mixed = attend(query, key, value)
        if encoder_hidden_states is None:
            return mixed
        text_length = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, text_length:]), attn.to_add_out(mixed[:, :text_length])
