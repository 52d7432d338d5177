"""Qwen-Image (and 2512): classifier-free guidance, each token rescaled, and masked text."""

from __future__ import annotations

from dataclasses import replace

from meancache_trt.errors import ExportError
from meancache_trt.export.family import (
    Configs,
    Family,
    Signatures,
    Size,
    setting,
)
from meancache_trt.export.packing import PACK
from meancache_trt.export.signatures import Text, grid_symbols, packed, signatures
from meancache_trt.export.tiles import space_axes
from meancache_trt.manifest import Guidance, Tiling

AXIS_POSITIONS = 512
"""Rows and columns of tokens that the prepare graph's RoPE tables cover: 8192 pixels."""

PIPELINE_MAX_TEXT_TOKENS = 1024
"""QwenImagePipeline.check_inputs refuses a longer max_sequence_length."""

_PIPELINE_TEXT_TOKENS = 512  # QwenImagePipeline.__call__, beyond the template that it cuts off
_TEMPLATE_TOKENS = 34  # QwenImagePipeline.__init__: prompt_template_encode_start_idx
_PIPELINE_SCALE = 4.0  # QwenImagePipeline.__call__, and the model card
_TRAINED_SIDE = 1328  # the square among the sizes of the model card
_SIDE_SETTING = "_sample_size"  # of vae/config.json, where another checkpoint says so

_TILE = (256, 192)  # AutoencoderKLQwenImage.__init__: a tile's pixels, and where the next begins

_ROPE_AXES = (16, 56, 56)  # QwenImageTransformer2DModel's default

# What other pipelines of these classes (editing, layers, a distilled guidance) set.
_UNSUPPORTED = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds")


def rope_axes(configs: Configs) -> tuple[int, ...]:
    """Width of each RoPE axis (frame, row, column) within an attention head."""
    return tuple(configs["transformer"].get("axes_dims_rope", _ROPE_AXES))


def _multiple(configs: Configs) -> int:
    # QwenImagePipeline.__init__: one halving for each entry.
    return int(PACK * 2 ** len(setting(configs, "vae", "temperal_downsample")))


def _longest_side(configs: Configs) -> int:
    return AXIS_POSITIONS * _multiple(configs)


def _symbols(configs: Configs, size: Size) -> dict[str, int]:
    return grid_symbols(size, unit=_multiple(configs))


def _guidance(_: Configs) -> Guidance:
    return Guidance(rule="classifier_free_rescaled", default_scale=_PIPELINE_SCALE)


def _default_side(configs: Configs) -> int:
    return int(configs["vae"].get(_SIDE_SETTING, _TRAINED_SIDE))


def _default_text_tokens(configs: Configs) -> int:
    # The tokenizer's limit, 131072 in Qwen-Image, counts the part of the template that is cut off.
    limit = configs["tokenizer"].get("model_max_length", PIPELINE_MAX_TEXT_TOKENS)
    return int(min(limit - _TEMPLATE_TOKENS, _PIPELINE_TEXT_TOKENS))


def _latent_channels(configs: Configs) -> int:
    """Channels of the unpacked latent; `ExportError` where this is another kind of checkpoint."""
    channels = setting(configs, "vae", "z_dim")
    packed = setting(configs, "transformer", "in_channels")
    if packed != channels * PACK * PACK:
        raise ExportError(
            f"the VAE has {channels} latent channels, so the transformer's in_channels should be "
            f"{channels * PACK * PACK}, but its config.json says {packed}; this is not a "
            "Qwen-Image text-to-image checkpoint"
        )
    for key in _UNSUPPORTED:
        if configs["transformer"].get(key, False):
            raise ExportError(
                f"transformer/config.json sets {key}, which Qwen-Image text-to-image checkpoints "
                "leave off; use Qwen/Qwen-Image or Qwen/Qwen-Image-2512"
            )
    return int(channels)


def _signatures(configs: Configs) -> Signatures:
    channels, width = _latent_channels(configs), sum(rope_axes(configs))
    features = setting(configs, "transformer", "joint_attention_dim")
    noise = (1, channels, "latent_height", "latent_width")  # of one frame
    return signatures(
        replace(packed(channels), noise=noise),
        Text({"encoder_hidden_states": ("text_tokens", features)}, "encoder_hidden_states_mask"),
        {"image_rope": ("image_tokens", width), "text_rope": ("text_tokens", width)},
        is_guided=True,
        sizes_from=("encoder_hidden_states",),
    )


def _tiling(configs: Configs) -> Tiling:
    unit = _multiple(configs)
    return Tiling(space=space_axes(*_TILE, unit=unit, latent_axis=1, image_axis=2))


QWEN_IMAGE = Family(
    name="qwen_image",
    pipelines=("QwenImagePipeline",),
    transformer_class="QwenImageTransformer2DModel",
    blocks=("transformer_blocks",),
    vae_class="AutoencoderKLQwenImage",
    text_components=("tokenizer", "text_encoder"),
    grid="linspace",
    timestep_scale=1 / 1000,
    guidance_argument="true_cfg_scale",
    text_tokens_argument="max_sequence_length",
    guidance=_guidance,
    default_text_tokens=_default_text_tokens,
    longest_text_tokens=PIPELINE_MAX_TEXT_TOKENS,
    float16_overflow="github.com/Comfy-Org/ComfyUI/issues/10751",
    multiple=_multiple,
    longest_side=_longest_side,
    default_side=_default_side,
    symbols=_symbols,
    signatures=_signatures,
    tiling=_tiling,
)
