"""Stable Diffusion 3 and 3.5 (medium, large): plain classifier-free guidance, unpacked latents."""

from __future__ import annotations

from meancache_trt.errors import ExportError
from meancache_trt.export.autoencoder_kl import latent_pixels, tiling
from meancache_trt.export.family import (
    Configs,
    Family,
    Signatures,
    Size,
    setting,
)
from meancache_trt.export.signatures import Text, grid_symbols, signatures, unpacked
from meancache_trt.manifest import Guidance, Tiling

PIPELINE_MAX_TEXT_TOKENS = 512
"""StableDiffusion3Pipeline.check_inputs refuses a longer max_sequence_length."""

_PIPELINE_TEXT_TOKENS = 256  # StableDiffusion3Pipeline.__call__; T5's alone
_PIPELINE_SCALE = 7.0  # likewise; the cards of 3.5 say 4.5 (medium) and 3.5 (large)
_CLIP_TOKENS = 77  # StableDiffusion3Pipeline.__init__, where a tokenizer does not say

# SD3Transformer2DModel.__init__
_PATCH, _SAMPLE_SIZE, _TABLE_SIDE = 2, 128, 96


def _patch(configs: Configs) -> int:
    """Latent rows, and columns, of one token."""
    return int(configs["transformer"].get("patch_size", _PATCH))


def _multiple(configs: Configs) -> int:
    return _patch(configs) * latent_pixels(configs)


def table_side(configs: Configs) -> int:
    """Rows, and columns, of tokens that the checkpoint's position table covers."""
    return int(configs["transformer"].get("pos_embed_max_size", _TABLE_SIDE))


def _longest_side(configs: Configs) -> int:
    return table_side(configs) * _multiple(configs)


def _default_side(configs: Configs) -> int:
    sample = configs["transformer"].get("sample_size", _SAMPLE_SIZE)
    return int(sample) * latent_pixels(configs)


def _symbols(configs: Configs, size: Size) -> dict[str, int]:
    clip_tokens = int(configs["tokenizer"].get("model_max_length", _CLIP_TOKENS))
    return {
        **grid_symbols(size, unit=_multiple(configs), patch=_patch(configs)),
        "prompt_tokens": clip_tokens + size.text_tokens,  # CLIP's features come before T5's
    }


def _guidance(_: Configs) -> Guidance:
    return Guidance(rule="classifier_free", default_scale=_PIPELINE_SCALE)


def _latent_channels(configs: Configs) -> int:
    """Channels of the latent; `ExportError` where VAE and transformer disagree."""
    channels = setting(configs, "vae", "latent_channels")
    found = {key: setting(configs, "transformer", key) for key in ("in_channels", "out_channels")}
    if set(found.values()) != {channels}:
        raise ExportError(
            f"the VAE has {channels} latent channels, so the transformer takes and makes as many, "
            f"but its config.json says {found}; this is not a Stable Diffusion 3 text-to-image "
            "checkpoint"
        )
    return int(channels)


def _signatures(configs: Configs) -> Signatures:
    features = setting(configs, "transformer", "joint_attention_dim")
    pooled = setting(configs, "transformer", "pooled_projection_dim")
    return signatures(
        unpacked(_latent_channels(configs)),
        Text(
            {"encoder_hidden_states": ("prompt_tokens", features), "pooled_projections": (pooled,)}
        ),
        is_guided=True,
    )


def _tiling(configs: Configs) -> Tiling:
    return tiling(configs, unit=latent_pixels(configs), latent_axis=2)


SD3 = Family(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline",),
    transformer_class="SD3Transformer2DModel",
    blocks=("transformer_blocks",),
    vae_class="AutoencoderKL",
    text_components=(
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
        "tokenizer_3",
        "text_encoder_3",
    ),
    grid="count",
    timestep_scale=1.0,
    guidance_argument="guidance_scale",
    text_tokens_argument="max_sequence_length",
    guidance=_guidance,
    default_text_tokens=lambda _: _PIPELINE_TEXT_TOKENS,
    longest_text_tokens=PIPELINE_MAX_TEXT_TOKENS,
    multiple=_multiple,
    longest_side=_longest_side,
    default_side=_default_side,
    symbols=_symbols,
    signatures=_signatures,
    tiling=_tiling,
)
