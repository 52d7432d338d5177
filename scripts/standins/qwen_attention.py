"""A training-time attention for Qwen-Image; saved pipelines keep diffusers' own."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from matmul_attention import Heads, attend, joined, stream_heads, text_heads
from torch import Tensor, nn


class FixedRope(nn.Module):
    """Stands in for `QwenEmbedRope` at one size: tables `(S, D)`, cosines then sines."""

    def __init__(self, image: Tensor, text: Tensor) -> None:
        super().__init__()
        self.register_buffer("image", image, persistent=False)
        self.register_buffer("text", text, persistent=False)

    def forward(
        self, img_shapes: object, max_txt_seq_len: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Tables of the image's and the text's tokens."""
        del img_shapes, device
        assert max_txt_seq_len == len(self.get_buffer("text"))
        return self.get_buffer("image"), self.get_buffer("text")


class MatmulQwenAttention:
    """Qwen-Image attention by explicit products.

    Rotates in real numbers, which `torch.compile` can fuse.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        *,
        image_rotary_emb: tuple[Tensor, Tensor],
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attends over the text tokens that are not masked, followed by image tokens."""
        assert attention_mask is None, "the text's mask is the only one"
        image_table, text_table = image_rotary_emb
        heads = joined(
            _rotated(text_heads(attn, encoder_hidden_states), text_table),
            _rotated(stream_heads(attn, hidden_states), image_table),
        )
        images = (0, hidden_states.shape[1])
        mask = nn.functional.pad(encoder_hidden_states_mask, images, value=True)
        mixed = attend(*heads, mask[:, None, None])
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, length:]), attn.to_add_out(mixed[:, :length])


def _rotated(heads: Heads, table: Tensor) -> Heads:
    query, key, value = heads
    return _rotate(query, table), _rotate(key, table), value


def _rotate(states: Tensor, table: Tensor) -> Tensor:
    """Neighbouring values as real and imaginary part, as `apply_rotary_emb_qwen` has it."""
    cos, sin = table[:, None].chunk(2, dim=-1)
    real, imaginary = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return turned.flatten(-2).type_as(states)
