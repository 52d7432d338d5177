"""Z-Image and Z-Image-Turbo: guidance that is added to the prompt's velocity, and masked text."""

from __future__ import annotations

from meancache_trt.errors import ExportError
from meancache_trt.export.autoencoder_kl import latent_pixels, sample_size, tiling
from meancache_trt.export.family import (
    Configs,
    Family,
    Signatures,
    Size,
    setting,
)
from meancache_trt.export.packing import PACK
from meancache_trt.export.signatures import Axes, Text, grid_symbols, signatures, unpacked
from meancache_trt.manifest import Guidance, Tiling

TOKEN_UNIT = 32
"""SEQ_MULTI_OF of diffusers: tokens of a picture, and of a prompt, are padded to a multiple."""

LONGEST_TEXT_TOKENS = 992
"""What ZImageTransformer2DModel's 1024 positions have room for: one before, the picture's after."""

_PIPELINE_TEXT_TOKENS = 512  # ZImagePipeline.__call__
_PIPELINE_SCALE = 5.0  # ZImagePipeline.__call__

# scheduler_config.json of Tongyi-MAI/Z-Image-Turbo; Tongyi-MAI/Z-Image has 6. No other file tells
# the distilled model, which is called without guidance.
_TURBO_SHIFT = 3.0

# ZImageTransformer2DModel's defaults
_ROPE_AXES, _ROPE_POSITIONS = (32, 48, 48), (1024, 512, 512)


def is_guided(configs: Configs) -> bool:
    """Whether the network is called with negative prompts too: not in Z-Image-Turbo."""
    return float(configs["scheduler"].get("shift", 1.0)) != _TURBO_SHIFT


def _multiple(configs: Configs) -> int:
    return PACK * latent_pixels(configs)


def _longest_side(configs: Configs) -> int:
    _, rows, columns = configs["transformer"].get("axes_lens", _ROPE_POSITIONS)
    return int(min(rows, columns)) * _multiple(configs)


def _symbols(configs: Configs, size: Size) -> dict[str, int]:
    symbols = grid_symbols(size, unit=_multiple(configs))
    tokens = symbols["image_tokens"]
    return {**symbols, "padded_image_tokens": tokens + -tokens % TOKEN_UNIT}


def _guidance(configs: Configs) -> Guidance:
    if is_guided(configs):
        return Guidance("classifier_free_from_conditional", default_scale=_PIPELINE_SCALE)
    return Guidance(rule="none", default_scale=None)


def _default_text_tokens(configs: Configs) -> int:
    limit = configs["tokenizer"].get("model_max_length", _PIPELINE_TEXT_TOKENS)
    return int(min(limit, _PIPELINE_TEXT_TOKENS))


def _latent_channels(configs: Configs) -> int:
    """`ExportError` where the network is not one that makes pictures from text alone."""
    transformer, channels = configs["transformer"], setting(configs, "vae", "latent_channels")
    found = transformer.get("in_channels", 16)
    patches = (transformer.get("all_patch_size", [PACK]), transformer.get("all_f_patch_size", [1]))
    is_patched = (PACK, 1) in zip(*patches, strict=False)
    if found != channels or not is_patched or transformer.get("siglip_feat_dim") is not None:
        raise ExportError(
            f"a Z-Image transformer takes the VAE's {channels} latent channels in patches of "
            f"{PACK} x {PACK} and no pictures, but its config.json says in_channels {found}, "
            f"all_patch_size and all_f_patch_size {patches}, siglip_feat_dim "
            f"{transformer.get('siglip_feat_dim')}; use Tongyi-MAI/Z-Image or Z-Image-Turbo"
        )
    return int(channels)


def _rope(configs: Configs) -> Axes:
    """One of each sample, since a picture's positions begin after its padded prompt."""
    width = sum(configs["transformer"].get("axes_dims", _ROPE_AXES))
    frames = configs["transformer"].get("axes_lens", _ROPE_POSITIONS)[0]
    if frames < LONGEST_TEXT_TOKENS + 2:
        raise ExportError(
            f"transformer/config.json gives {frames} positions to text, expected at least "
            f"{LONGEST_TEXT_TOKENS + 2}, as every Z-Image has; use an unmodified checkpoint"
        )
    batch = "two_batch" if is_guided(configs) else "batch"
    return (batch, "padded_image_tokens", width)


def _signatures(configs: Configs) -> Signatures:
    features = configs["transformer"].get("cap_feat_dim", 2560)
    mask = "encoder_hidden_states_mask"
    return signatures(
        unpacked(_latent_channels(configs)),
        Text({"encoder_hidden_states": ("text_tokens", features)}, mask),
        {"image_rope": _rope(configs)},
        is_guided=is_guided(configs),
        sizes_from=(mask,),
    )


def _tiling(configs: Configs) -> Tiling:
    return tiling(configs, unit=latent_pixels(configs), latent_axis=2)


Z_IMAGE = Family(
    name="z_image",
    pipelines=("ZImagePipeline",),
    transformer_class="ZImageTransformer2DModel",
    blocks=("noise_refiner", "context_refiner", "layers"),
    vae_class="AutoencoderKL",
    text_components=("tokenizer", "text_encoder"),
    grid="linspace",
    timestep_scale=1.0,
    guidance_argument="guidance_scale",
    text_tokens_argument="max_sequence_length",
    guidance=_guidance,
    default_text_tokens=_default_text_tokens,
    longest_text_tokens=LONGEST_TEXT_TOKENS,
    float16_overflow="github.com/Tongyi-MAI/Z-Image/issues/14",
    multiple=_multiple,
    longest_side=_longest_side,
    default_side=sample_size,
    symbols=_symbols,
    signatures=_signatures,
    tiling=_tiling,
    # The module's: of opposite sign, a list, each with an axis for frames.
    module_output=lambda velocity: list(-velocity[:, :, None]),
)
