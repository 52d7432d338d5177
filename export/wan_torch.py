"""The wrapper of Wan: modules to trace, and diffusers' own code as the oracle.

The decoder graph decodes a video in one piece. diffusers decodes one latent frame after another and
keeps what its causal convolutions read of those before, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    WanUpsample,
    unpatchify,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from meancache_trt.errors import InputError
from meancache_trt.export import grid_rope_torch
from meancache_trt.export import wan as spec
from meancache_trt.export.family import Configs
from meancache_trt.export.grid_rope_torch import Embed, GridPreparation, grid_tables
from meancache_trt.export.patching import replaced
from meancache_trt.export.timesteps import fixed_timestep_frequencies

positions = grid_rope_torch.positions

POSITION_ARGUMENTS: tuple[str, ...] = ()

_Tables = tuple[Tensor, Tensor]


class _GivenRope(nn.Module):
    """Stands in for `WanRotaryPosEmbed`; gives the tables that it was handed."""

    tables: _Tables

    def forward(self, hidden_states: Tensor) -> _Tables:  # noqa: ARG002
        return self.tables


def _rotated(value: Tensor, tables: _Tables) -> Tensor:
    """Neighbours of `value` (B, S, heads, D) turned as pairs, in float32, then its dtype again.

    Tables are (S, D) and say everything twice. diffusers writes into an empty tensor instead.
    """
    cos, sin = tables[0][:, None, 0::2], tables[1][:, None, 1::2]
    first, second = value.float().reshape(*value.shape[:-1], -1, 2).unbind(-1)
    parts = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(parts, dim=-1).flatten(-2).type_as(value)


def _attend(
    _: Any,
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: None = None,
    rotary_emb: _Tables | None = None,
) -> Tensor:
    """`WanAttnProcessor` without images and masks, neither of which text to video has."""
    assert attention_mask is None
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    projected = (
        attention.norm_q(attention.to_q(hidden_states)),
        attention.norm_k(attention.to_k(source)),
        attention.to_v(source),
    )
    query, key, value = (each.unflatten(2, (attention.heads, -1)) for each in projected)
    if rotary_emb is not None:
        query, key = _rotated(query, rotary_emb), _rotated(key, rotary_emb)
    heads = (each.transpose(1, 2) for each in (query, key, value))
    attended = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    projection: Tensor = attention.to_out[0](attended)
    return projection


class _Transformer(nn.Module):
    def __init__(self, network: nn.Module, rope: _GivenRope) -> None:
        super().__init__()
        self.network = network
        self._rope = rope

    def forward(
        self,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> Tensor:
        network: Any = self.network
        dtype = network.patch_embedding.weight.dtype  # others stay float32
        self._relate_sizes(hidden_states, rope_cos, rope_sin)
        self._rope.tables = (rope_cos.flatten(0, 2), rope_sin.flatten(0, 2))
        velocity: Tensor = network(
            hidden_states=hidden_states.to(dtype),
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            return_dict=False,
        )[0]
        return velocity.float()

    def _relate_sizes(self, latent: Tensor, *tables: Tensor) -> None:
        """Tell the tracer that a latent's extents are so many times those of its tables."""
        network, check = cast("Any", self.network), cast("Any", torch._check)
        for table in tables:
            for axis, extent in enumerate(network.config.patch_size):
                check(latent.shape[axis + 2] == extent * table.shape[axis])


@contextmanager
def transformer_graph(network: nn.Module) -> Iterator[nn.Module]:
    """`WanTransformer3DModel`, its position tables inputs, its frequencies constants.

    Replaces diffusers' attention meanwhile, so no other Wan may run then.
    """
    given = _GivenRope()
    attention = (WanAttnProcessor, "__call__", _attend)
    with replaced((network, "rope", given), attention), fixed_timestep_frequencies(network):
        yield _Transformer(network, given)


def _embed(rope: Any) -> Embed:
    """`WanRotaryPosEmbed` without the axes of batch and heads."""
    return lambda latent: [table.flatten(0, 2) for table in rope(latent)]


def prepare_graph(network: nn.Module, configs: Configs) -> nn.Module:
    """Noise to the loop's latent, which is the same, the same twice, and the two RoPE tables."""
    rope: Any = network.rope
    return GridPreparation(
        _embed(rope),
        spec.rope_axes(configs),
        positions=spec.positions(configs),
        patch=rope.patch_size[1],
        is_guided=True,
    )


def _resample(resampler: Any, video: Tensor, *_: Any, **__: Any) -> Tensor:
    """`WanResample.forward` of a whole video.

    In time it makes two frames of each but the first, which the convolution does not see either.
    """
    if resampler.mode == "upsample3d":
        batch, channels, frames, height, width = video.shape
        first = video[:, :, :1]
        unseen = torch.cat([torch.zeros_like(first), video[:, :, 1:]], dim=2)
        pairs = resampler.time_conv(unseen).unflatten(1, (2, channels)).permute(0, 2, 3, 1, 4, 5)
        doubled = pairs.reshape(batch, channels, 2 * frames, height, width)
        video = torch.cat([first, doubled[:, :, 2:]], dim=2)
    batch, _channels, frames = video.shape[:3]
    pictures: Tensor = resampler.resample(video.transpose(1, 2).flatten(0, 1))
    resampled: Tensor = pictures.reshape(batch, frames, *pictures.shape[1:])
    return resampled.transpose(1, 2)


def _double(_: Any, frame: Tensor) -> Tensor:
    """`WanUpsample`, whose "nearest-exact" ONNX lacks; at twice the size "nearest" is it."""
    return interpolate(frame, scale_factor=2.0, mode="nearest")


class _Decoder(nn.Module):
    """`AutoencoderKLWan.decode` in one piece, and the frames' black to 0, white to 1."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.network = vae
        for name in ("mean", "std"):
            values = torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        vae: Any = self.network
        # As WanPipeline has it, where the second division rounds otherwise than a product.
        unscaled = latent / (1.0 / self.get_buffer("std")) + self.get_buffer("mean")
        with replaced((WanResample, "forward", _resample), (WanUpsample, "forward", _double)):
            video: Tensor = vae.decoder(
                vae.post_quant_conv(unscaled.to(vae.dtype)), first_chunk=True
            )
        if vae.config.patch_size is not None:
            video = unpatchify(video, vae.config.patch_size)
        return video.float() * 0.5 + 0.5  # VaeImageProcessor.denormalize, which clips afterwards


def decoder_graph(vae: nn.Module) -> nn.Module:
    """Latent to a video in one piece, black 0 and white 1, not clipped."""
    return _Decoder(vae)


def reference_velocity(
    network: nn.Module,
    feeds: Mapping[str, Tensor],
    symbols: Mapping[str, int],  # noqa: ARG001
) -> Tensor:
    """The unpatched transformer, called as WanPipeline calls it."""
    inputs = {name: value for name, value in feeds.items() if not name.startswith("rope_")}
    velocity: Tensor = network(**inputs, return_dict=False)[0]
    return velocity


def reference_preparation(
    network: nn.Module,
    feeds: Mapping[str, Tensor],
    symbols: Mapping[str, int],  # noqa: ARG001
) -> dict[str, Tensor]:
    """The noise itself, the same twice, and what `WanRotaryPosEmbed` computes for it."""
    rope: Any = network.rope
    noise = feeds["noise"]
    tables = grid_tables(_embed(rope), noise, rope.patch_size[1])
    return {"latent": noise, "model_input": torch.cat([noise, noise]), **tables}


def reference_image(
    vae: nn.Module,
    latent: Tensor,
    symbols: Mapping[str, int],  # noqa: ARG001
) -> Tensor:
    """What WanPipeline does after the loop, up to the video in [0, 1]."""
    model: Any = vae
    shape = (1, model.config.z_dim, 1, 1, 1)
    mean = torch.tensor(model.config.latents_mean).view(shape)
    inverse = 1.0 / torch.tensor(model.config.latents_std).view(shape)
    video: Tensor = model.decode(latent / inverse + mean, return_dict=False)[0]
    return (video * 0.5 + 0.5).clamp(0, 1)


def encode_prompts(pipeline: Any, prompts: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
    """UMT5's features (B, text_tokens, D), zero where padded."""
    features, _ = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=text_tokens,
        device="cpu",
    )
    return {"encoder_hidden_states": features}


def graph_inputs(configs: Configs, arguments: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """One timestep a sample, where the pipeline of Wan 2.2 TI2V-5B gives one of each token.

    Raises `InputError` where those differ, as they do for image to video.
    """
    inputs = dict(arguments)
    times = inputs["timestep"]
    if times.ndim == 2:
        if not bool((times == times[:, :1]).all()):
            raise InputError(
                "expected one timestep for all tokens of a sample, found several, as in image to "
                "video; use the diffusers transformer for this pipeline"
            )
        inputs["timestep"] = times[:, 0]
    return inputs


def position_tables(configs: Configs, extents: tuple[int, ...]) -> dict[str, Tensor]:
    """Cosines and sines, (frames, rows, columns, width)."""
    config = configs["transformer"]
    embed = WanRotaryPosEmbed(
        config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"]
    )
    return grid_tables(_embed(embed), torch.empty(1, 1, *extents), config["patch_size"][1])
