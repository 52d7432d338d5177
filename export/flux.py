"""FLUX.1 (dev and schnell): guidance is embedded where the transformer's configuration says so."""

from __future__ import annotations

from meancache_trt.errors import ExportError
from meancache_trt.export.autoencoder_kl import latent_pixels, sample_size, tiling
from meancache_trt.export.family import (
    Configs,
    Family,
    Signature,
    Signatures,
    Size,
    TextGraph,
    float32,
    setting,
)
from meancache_trt.export.packing import PACK
from meancache_trt.export.signatures import Axes, Text, grid_symbols, packed, signatures
from meancache_trt.manifest import Guidance, TensorRecord, Tiling

AXIS_POSITIONS = 512
"""Rows and columns of tokens that the prepare graph's RoPE tables cover: 8192 pixels in FLUX.1."""

PIPELINE_MAX_TEXT_TOKENS = 512
"""FluxPipeline.check_inputs refuses a longer max_sequence_length."""


_ROPE_AXES = (16, 56, 56)  # FluxTransformer2DModel's default; FLUX.1-dev's config.json omits it


def rope_axes(configs: Configs) -> tuple[int, ...]:
    """Width of each RoPE axis (index, row, column) within an attention head."""
    return tuple(configs["transformer"].get("axes_dims_rope", _ROPE_AXES))


def _multiple(configs: Configs) -> int:
    return PACK * latent_pixels(configs)


def _longest_side(configs: Configs) -> int:
    return AXIS_POSITIONS * _multiple(configs)


def _default_side(configs: Configs) -> int:
    # FLUX.1's own VAE configuration says 1024, which is also FluxPipeline's default.
    return sample_size(configs)


def _symbols(configs: Configs, size: Size) -> dict[str, int]:
    return grid_symbols(size, unit=_multiple(configs))


def _guidance(configs: Configs) -> Guidance:
    if configs["transformer"].get("guidance_embeds", False):
        return Guidance(rule="embedded", default_scale=3.5)  # FluxPipeline.__call__
    return Guidance(rule="none", default_scale=None)


def _default_text_tokens(configs: Configs) -> int:
    # transformers writes 1e30 where a tokenizer has no limit.
    limit = configs["tokenizer_2"].get("model_max_length", PIPELINE_MAX_TEXT_TOKENS)
    return int(min(limit, PIPELINE_MAX_TEXT_TOKENS))


def _latent_channels(configs: Configs) -> int:
    """Channels of the unpacked latent; `ExportError` where VAE and transformer disagree."""
    channels = setting(configs, "vae", "latent_channels")
    packed = setting(configs, "transformer", "in_channels")
    if packed != channels * PACK * PACK:
        raise ExportError(
            f"the VAE has {channels} latent channels, so the transformer's in_channels should be "
            f"{channels * PACK * PACK}, but its config.json says {packed}; this is not a FLUX.1 "
            "text-to-image checkpoint"
        )
    return int(channels)


def _text(configs: Configs) -> Axes:
    return ("text_tokens", setting(configs, "transformer", "joint_attention_dim"))


def _pooled(configs: Configs) -> Axes:
    return (setting(configs, "transformer", "pooled_projection_dim"),)


def _signatures(configs: Configs) -> Signatures:
    width = 2 * sum(rope_axes(configs))
    return signatures(
        packed(_latent_channels(configs)),
        Text({"encoder_hidden_states": _text(configs), "pooled_projections": _pooled(configs)}),
        {"image_rope": ("image_tokens", width), "text_rope": ("text_tokens", width)},
        is_embedded=_guidance(configs).rule == "embedded",
        sizes_from=("encoder_hidden_states",),
    )


def _tiling(configs: Configs) -> Tiling:
    return tiling(configs, unit=_multiple(configs), latent_axis=1)


def _clip(configs: Configs) -> Signature:
    # FluxPipeline pads to the tokenizer's limit, 77; the encoder knows no more positions.
    positions = configs["text_encoder"].get("max_position_embeddings", 77)
    tokens = min(configs["tokenizer"].get("model_max_length", positions), positions)
    ids = TensorRecord("int64", ("batch", int(tokens)), "token_ids")
    pooled = float32("conditioning", "batch", *_pooled(configs))
    return Signature({"input_ids": ids}, {"pooled_projections": pooled})


def _t5(configs: Configs) -> Signature:
    ids = TensorRecord("int64", ("batch", "text_tokens"), "token_ids")
    text = float32("conditioning", "batch", *_text(configs))
    return Signature({"input_ids": ids}, {"encoder_hidden_states": text})


_TEXT_GRAPHS = (
    TextGraph(
        component="text_encoder",
        tokenizer="tokenizer",
        encoder_class="CLIPTextModel",
        field="pooler_output",
        blocks=("encoder.layers",),
        signature=_clip,
        former_prefix="text_model.",
    ),
    TextGraph(
        component="text_encoder_2",
        tokenizer="tokenizer_2",
        encoder_class="T5EncoderModel",
        field="last_hidden_state",
        blocks=("encoder.block",),
        is_float16_safe=False,  # transformers keeps part of T5 in float32 for that
        signature=_t5,
    ),
)


FLUX = Family(
    name="flux",
    pipelines=("FluxPipeline",),
    transformer_class="FluxTransformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    vae_class="AutoencoderKL",
    text_components=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    grid="linspace",
    timestep_scale=1 / 1000,
    guidance_argument="guidance_scale",
    text_tokens_argument="max_sequence_length",
    guidance=_guidance,
    default_text_tokens=_default_text_tokens,
    multiple=_multiple,
    longest_side=_longest_side,
    default_side=_default_side,
    symbols=_symbols,
    signatures=_signatures,
    longest_text_tokens=PIPELINE_MAX_TEXT_TOKENS,
    tiling=_tiling,
    text_graphs=_TEXT_GRAPHS,
)
