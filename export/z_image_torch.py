"""The wrapper of Z-Image: modules to trace, and diffusers' own code as the oracle.

The module takes lists of pictures and of prompts without padding, and pads both in Python. Its
graph takes padded batches with a mask, and pads further, to multiples of 32 tokens, by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import (
    RopeEmbedder,
    ZSingleStreamAttnProcessor,
)
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from meancache_trt.errors import InputError
from meancache_trt.export import autoencoder_kl_torch
from meancache_trt.export.family import Configs
from meancache_trt.export.packing import PACK
from meancache_trt.export.patching import replaced
from meancache_trt.export.rotation import real, rotated
from meancache_trt.export.z_image import LONGEST_TEXT_TOKENS, TOKEN_UNIT, is_guided

decoder_graph = autoencoder_kl_torch.decoder_graph
reference_image = autoencoder_kl_torch.reference_image

POSITION_ARGUMENTS: tuple[str, ...] = ()

_PIPELINE_TIMESTEPS = 1000.0  # ZImagePipeline.__call__ feeds (1000 - timestep) / 1000
_MAX_PERIOD = 10000  # TimestepEmbedder.timestep_embedding
_PATCH = f"{PACK}-1"  # how the module calls its layers for patches of 2 x 2 in one frame


def _attend(
    _: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: None = None,
    attention_mask: Tensor | None = None,
    freqs_cis: Tensor | None = None,
) -> Tensor:
    """`ZSingleStreamAttnProcessor` with a real position table."""
    assert encoder_hidden_states is None
    assert freqs_cis is not None
    layers = (attn.to_q, attn.to_k, attn.to_v)
    query, key, value = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in layers)
    if attn.norm_q is not None:
        query, key = attn.norm_q(query), attn.norm_k(key)
    query, key = rotated(query, freqs_cis), rotated(key, freqs_cis)
    mask = None if attention_mask is None else attention_mask[:, None, None]
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    projected: Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
    return projected


def _padded_lengths(mask: Tensor) -> Tensor:
    """Of each prompt (B,), with the padding that the network sees; at least one unit."""
    units = (mask.sum(dim=1).clamp(min=1) + TOKEN_UNIT - 1) // TOKEN_UNIT
    return units * TOKEN_UNIT


def _patchified(latent: Tensor) -> Tensor:
    """(B, C, Hl, Wl) to (B, S, 4 C), channels last in a patch."""
    batch, channels, height, width = latent.shape
    rows, columns = height // PACK, width // PACK
    patches = latent.reshape(batch, channels, rows, PACK, columns, PACK)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def _unpatchified(tokens: Tensor, rows: int, columns: int) -> Tensor:
    batch = tokens.shape[0]
    patches = tokens.reshape(batch, rows, columns, PACK, PACK, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, PACK * rows, PACK * columns)


class _Transformer(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        half = network.t_embedder.frequency_embedding_size // 2
        exponents = -math.log(_MAX_PERIOD) * torch.arange(0, half, dtype=torch.float32) / half
        self.register_buffer("frequencies", torch.exp(exponents), persistent=False)
        ids = torch.zeros(LONGEST_TEXT_TOKENS, 3, dtype=torch.int64)
        ids[:, 0] = torch.arange(1, LONGEST_TEXT_TOKENS + 1)
        self.register_buffer("text_rope", real(network.rope_embedder(ids)), persistent=False)

    def _time(self, timestep: Tensor) -> Tensor:
        """What modulates every block. Exact up to the sines, unlike a rounded timestep."""
        network: Any = self.network
        time = (_PIPELINE_TIMESTEPS - timestep) / _PIPELINE_TIMESTEPS * network.config.t_scale
        phase = time[:, None] * self.get_buffer("frequencies")
        waves = torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)
        embedded: Tensor = network.t_embedder.mlp(waves.to(network.x_pad_token.dtype))
        return embedded

    def _image(self, latent: Tensor, tokens: int) -> Tensor:
        """Embedded patches, padded to so many tokens with the learnt one."""
        network: Any = self.network
        patches = _patchified(latent)
        found = patches.shape[1]
        embedded = network.all_x_embedder[_PATCH](pad(patches, (0, 0, 0, tokens - found)))
        is_own = torch.arange(tokens)[:, None] < found
        return torch.where(is_own, embedded, network.x_pad_token)

    def _text(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompts, padded likewise, and which of their tokens the network sees."""
        network: Any = self.network
        missing = -features.shape[1] % TOKEN_UNIT
        embedded = network.cap_embedder(pad(features, (0, 0, 0, missing)))
        is_own = pad(mask, (0, missing))
        padded = torch.where(is_own[..., None], embedded, network.cap_pad_token)
        return padded, torch.arange(padded.shape[1]) < _padded_lengths(mask)[:, None]

    def forward(
        self,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        timestep: Tensor,
        image_rope: Tensor,
    ) -> Tensor:
        network: Any = self.network
        dtype = network.x_pad_token.dtype
        rows, columns = (extent // PACK for extent in hidden_states.shape[2:])
        time = self._time(timestep)
        image = self._image(hidden_states.to(dtype), image_rope.shape[1])
        for block in network.noise_refiner:
            image = block(image, None, image_rope, time)
        text, is_seen = self._text(encoder_hidden_states.to(dtype), encoder_hidden_states_mask)
        text_rope = self.get_buffer("text_rope")[: text.shape[1]].expand(text.shape[0], -1, -1)
        for block in network.context_refiner:
            text = block(text, is_seen, text_rope)
        tokens, rope = torch.cat([image, text], dim=1), torch.cat([image_rope, text_rope], dim=1)
        is_seen = pad(is_seen, (image.shape[1], 0), value=True)
        for block in network.layers:
            tokens = block(tokens, is_seen, rope, time)
        patches = network.all_final_layer[_PATCH](tokens[:, : rows * columns], c=time)
        return -_unpatchified(patches.float(), rows, columns)


@contextmanager
def transformer_graph(network: nn.Module) -> Iterator[nn.Module]:
    """`ZImageTransformer2DModel` over padded batches; the output has the sign of dx/dsigma.

    Replaces diffusers' attention meanwhile, so no other Z-Image may run then.
    """
    with replaced((ZSingleStreamAttnProcessor, "__call__", _attend)):
        yield _Transformer(network)


class _Prepare(nn.Module):
    """Passes noise through, and assembles RoPE from diffusers' table of each axis."""

    def __init__(self, embedder: Any, *, is_guided: bool) -> None:
        super().__init__()
        self.is_guided = is_guided
        lengths = (embedder.axes_dims, embedder.axes_lens)
        tables = RopeEmbedder.precompute_freqs_cis(*lengths, theta=embedder.theta)
        for axis, table in enumerate(tables):
            self.register_buffer(f"cos_{axis}", table.real.contiguous(), persistent=False)
            self.register_buffer(f"sin_{axis}", table.imag.contiguous(), persistent=False)

    def _table(self, name: str, frames: Tensor, rows: int, columns: int) -> Tensor:
        """(B, S, width), the picture's tokens at frame `frames` (B,)."""
        frame, row, column = (self.get_buffer(f"{name}_{axis}") for axis in range(3))
        batch = frames.shape[0]
        parts = (
            frame[frames][:, None, None].expand(-1, rows, columns, -1),
            row[:rows, None].expand(batch, -1, columns, -1),
            column[None, :columns].expand(batch, rows, -1, -1),
        )
        return torch.cat(parts, dim=-1).flatten(1, 2)

    def forward(self, noise: Tensor, encoder_hidden_states_mask: Tensor) -> tuple[Tensor, ...]:
        rows, columns = (extent // PACK for extent in noise.shape[2:])
        frames = _padded_lengths(encoder_hidden_states_mask) + 1
        padding = (0, 0, 0, -(rows * columns) % TOKEN_UNIT)  # position 0 on all axes: no rotation
        cos = pad(self._table("cos", frames, rows, columns), padding, value=1.0)
        sin = pad(self._table("sin", frames, rows, columns), padding)
        rope = torch.cat([cos, sin], dim=-1)
        twice = [torch.cat([noise, noise])] if self.is_guided else []
        return noise.clone(), *twice, rope


def prepare_graph(network: nn.Module, configs: Configs) -> nn.Module:
    """Noise to the loop's latent, which is the same; with the text mask, the picture's RoPE."""
    embedder: Any = network.rope_embedder
    return _Prepare(embedder, is_guided=is_guided(configs))


def reference_velocity(
    network: nn.Module,
    feeds: Mapping[str, Tensor],
    symbols: Mapping[str, int],  # noqa: ARG001
) -> Tensor:
    """The unpatched transformer, called as ZImagePipeline calls it, and the sign that it gives."""
    pairs = zip(feeds["encoder_hidden_states"], feeds["encoder_hidden_states_mask"], strict=True)
    outputs = network(
        list(feeds["hidden_states"][:, :, None]),
        (1000 - feeds["timestep"]) / 1000,
        [features[mask] for features, mask in pairs],
        return_dict=False,
    )[0]
    return -torch.stack(outputs).squeeze(2)


def reference_preparation(
    network: nn.Module,
    feeds: Mapping[str, Tensor],
    symbols: Mapping[str, int],  # noqa: ARG001
) -> dict[str, Tensor]:
    """The noise itself, and what the transformer computes from its own positions."""
    model: Any = network
    noise, masks = feeds["noise"], feeds["encoder_hidden_states_mask"]
    pictures = [noise[0][:, None]] * len(masks)
    captions = [torch.zeros(int(mask.sum()), 1) for mask in masks]
    ids = model.patchify_and_embed(pictures, captions, PACK, 1)[3]
    rope = torch.stack([real(model.rope_embedder(each)) for each in ids])
    made = {"latent": noise, "image_rope": rope}
    return made if len(masks) == len(noise) else {**made, "model_input": noise.repeat(2, 1, 1, 1)}


def encode_prompts(pipeline: Any, prompts: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
    """Features (B, text_tokens, D), zero where padded, and mask (B, text_tokens), bool."""
    found, _ = pipeline.encode_prompt(
        list(prompts),  # which the pipeline writes its chat template into
        device="cpu",
        do_classifier_free_guidance=False,
        max_sequence_length=text_tokens,
    )
    return _batched(found, text_tokens)


def _batched(captions: Sequence[Tensor], text_tokens: int) -> dict[str, Tensor]:
    """Features of several lengths, padded to one, and their mask."""
    features = [pad(each, (0, 0, 0, text_tokens - len(each))) for each in captions]
    lengths = torch.tensor([len(each) for each in captions])
    return {
        "encoder_hidden_states": torch.stack(features),
        "encoder_hidden_states_mask": torch.arange(text_tokens) < lengths[:, None],
    }


def graph_inputs(configs: Configs, arguments: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """Lists as padded batches, and the timestep in the scheduler's units."""
    inputs = dict(arguments)
    latents, captions = _latents(inputs.pop("x")), inputs.pop("cap_feats")
    time = inputs.pop("t").double()
    return {
        "hidden_states": torch.stack(latents)[:, :, 0],
        "timestep": _PIPELINE_TIMESTEPS - _PIPELINE_TIMESTEPS * time,
        **_batched(captions, max(map(len, captions))),
        **inputs,
    }


def _latents(pictures: Any) -> list[Tensor]:
    """Raises `InputError` for what the graph cannot follow: sizes that differ, and more frames."""
    shapes = [getattr(picture, "shape", None) for picture in pictures]
    if len(set(shapes)) != 1 or shapes[0] is None or shapes[0][1] != 1:
        raise InputError(
            f"expected latents (C, 1, Hl, Wl) of one size, found {shapes}; call the pipeline once "
            "for each size, and for editing use the diffusers transformer"
        )
    return list(pictures)


def positions(arguments: Mapping[str, Any]) -> tuple[int, int, tuple[int, ...]]:
    """Rows and columns of tokens, and each prompt's tokens with its padding."""
    _, _, height, width = arguments["x"][0].shape
    lengths = tuple(len(each) + -len(each) % TOKEN_UNIT for each in arguments["cap_feats"])
    return height // PACK, width // PACK, lengths


def position_tables(
    configs: Configs, rows: int, columns: int, lengths: Sequence[int]
) -> dict[str, Tensor]:
    """Cosines, then sines, of each sample."""
    config = configs["transformer"]
    embed = RopeEmbedder(config["rope_theta"], config["axes_dims"], config["axes_lens"])
    padding = torch.zeros(-(rows * columns) % TOKEN_UNIT, 3, dtype=torch.int32)
    tables = []
    for length in lengths:
        start = (length + 1, 0, 0)
        grid = ZImageTransformer2DModel.create_coordinate_grid((1, rows, columns), start)
        tables.append(real(embed(torch.cat([grid.flatten(0, 2), padding]))))
    return {"image_rope": torch.stack(tables)}
