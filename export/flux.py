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
    Wrapper,
    float32,
    setting,
)
from meancache_trt.export.packing import PACK
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
    rows, columns = (pixels // _multiple(configs) for pixels in (size.height, size.width))
    return {
        "height": size.height,
        "width": size.width,
        "latent_height": PACK * rows,
        "latent_width": PACK * columns,
        "latent_rows": rows,
        "latent_columns": columns,
        "image_tokens": rows * columns,
        "text_tokens": size.text_tokens,
    }


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


def _rope(configs: Configs) -> dict[str, TensorRecord]:
    width = 2 * sum(rope_axes(configs))
    return {
        "image_rope": float32("prepared", "image_tokens", width),
        "text_rope": float32("prepared", "text_tokens", width),
    }


def _text(configs: Configs) -> TensorRecord:
    features = setting(configs, "transformer", "joint_attention_dim")
    return float32("conditioning", "batch", "text_tokens", features)


def _pooled(configs: Configs) -> TensorRecord:
    features = setting(configs, "transformer", "pooled_projection_dim")
    return float32("conditioning", "batch", features)


def _transformer(configs: Configs) -> Signature:
    packed = _latent_channels(configs) * PACK * PACK
    inputs = {
        "hidden_states": float32("latent", "batch", "image_tokens", packed),
        "encoder_hidden_states": _text(configs),
        "pooled_projections": _pooled(configs),
        "timestep": float32("timestep", "batch"),
    }
    if _guidance(configs).rule == "embedded":
        inputs["guidance"] = float32("guidance_scale", "batch")
    velocity = float32("velocity", "batch", "image_tokens", packed)
    return Signature({**inputs, **_rope(configs)}, {"velocity": velocity})


def _prepare(configs: Configs) -> Signature:
    channels = _latent_channels(configs)
    noise = float32("noise", "batch", channels, "latent_height", "latent_width")
    latent = float32("latent", "batch", "image_tokens", channels * PACK * PACK)
    return Signature(
        {"noise": noise, "encoder_hidden_states": _text(configs)},
        {"latent": latent, **_rope(configs)},
    )


def _vae_decoder(configs: Configs) -> Signature:
    packed = _latent_channels(configs) * PACK * PACK
    latent = float32("latent_grid", "batch", "latent_rows", "latent_columns", packed)
    image = float32("image", "batch", 3, "height", "width")
    return Signature({"latent": latent}, {"image": image})


def _signatures(configs: Configs) -> Signatures:
    return Signatures(_transformer(configs), _prepare(configs), _vae_decoder(configs))


def _tiling(configs: Configs) -> Tiling:
    return tiling(configs, unit=_multiple(configs), latent_axis=1)


def _clip(configs: Configs) -> Signature:
    # FluxPipeline pads to the tokenizer's limit, 77; the encoder knows no more positions.
    positions = configs["text_encoder"].get("max_position_embeddings", 77)
    tokens = min(configs["tokenizer"].get("model_max_length", positions), positions)
    ids = TensorRecord("int64", ("batch", int(tokens)), "token_ids")
    return Signature({"input_ids": ids}, {"pooled_projections": _pooled(configs)})


def _t5(configs: Configs) -> Signature:
    ids = TensorRecord("int64", ("batch", "text_tokens"), "token_ids")
    return Signature({"input_ids": ids}, {"encoder_hidden_states": _text(configs)})


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


def _wrapper() -> Wrapper:
    from meancache_trt.export import flux_torch  # noqa: PLC0415  torch must stay out of the spec

    return flux_torch


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
    wrapper=_wrapper,
    longest_text_tokens=PIPELINE_MAX_TEXT_TOKENS,
    tiling=_tiling,
    text_graphs=_TEXT_GRAPHS,
)
