"""A training-time attention for Qwen-Image; saved pipelines keep diffusers' own."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

Heads = tuple[Tensor, Tensor, Tensor]


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
    """Qwen-Image attention by explicit products: its CPU backward takes half the time of SDPA's.

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
        parts = (
            _rotated(_text_heads(attn, encoder_hidden_states), text_table),
            _rotated(_image_heads(attn, hidden_states), image_table),
        )
        heads = [torch.cat(tensors, 1).transpose(1, 2) for tensors in zip(*parts, strict=True)]
        mixed = _attend(heads, encoder_hidden_states_mask)
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, length:]), attn.to_add_out(mixed[:, :length])


def _image_heads(attn: Attention, states: Tensor) -> Heads:
    projected = (attn.to_q(states), attn.to_k(states), attn.to_v(states))
    query, key, value = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in projected)
    return attn.norm_q(query), attn.norm_k(key), value


def _text_heads(attn: Attention, states: Tensor) -> Heads:
    projected = (attn.add_q_proj(states), attn.add_k_proj(states), attn.add_v_proj(states))
    query, key, value = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in projected)
    return attn.norm_added_q(query), attn.norm_added_k(key), value


def _rotated(heads: Heads, table: Tensor) -> Heads:
    query, key, value = heads
    return _rotate(query, table), _rotate(key, table), value


def _rotate(states: Tensor, table: Tensor) -> Tensor:
    """Neighbouring values as real and imaginary part, as `apply_rotary_emb_qwen` has it."""
    cos, sin = table[:, None].chunk(2, dim=-1)
    real, imaginary = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return turned.flatten(-2).type_as(states)


def _attend(heads: list[Tensor], text_mask: Tensor) -> Tensor:
    query, key, value = heads
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    images = key.shape[2] - text_mask.shape[1]
    mask = nn.functional.pad(text_mask, (0, images), value=True)[:, None, None]
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
