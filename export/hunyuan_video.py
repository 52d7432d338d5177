"""HunyuanVideo: text to video, with a guidance scale that is embedded in the network."""

from __future__ import annotations

from meancache_trt.errors import ExportError
from meancache_trt.export.family import (
    Configs,
    Family,
    FrameRule,
    Signatures,
    Size,
    setting,
)
from meancache_trt.export.signatures import Text, grid_symbols, signatures, video
from meancache_trt.export.tiles import causal_time_axis, space_axes
from meancache_trt.manifest import Guidance, Tiling

AXIS_POSITIONS = 512
"""Frames, rows and columns of tokens that the prepare graph's RoPE tables cover: 8192 pixels."""

GUIDANCE_UNITS = 1000.0
"""HunyuanVideoPipeline.__call__ feeds the network its guidance scale times this."""

_PIPELINE_FRAMES = 129  # HunyuanVideoPipeline.__call__, about five seconds
_PIPELINE_TEXT_TOKENS = 256  # likewise, beyond the template that it cuts off
_TEMPLATE_TOKENS = 95  # `crop_start` of that template
_LLAMA_POSITIONS = 2048  # LlamaConfig's default
_TRAINED_SIDE = 720  # the square among the sizes that HunyuanVideo's authors list

# Where vae/config.json says otherwise of its checkpoint, as AutoencoderKL's sample_size does. The
# class has no such settings; diffusers ignores those that begin with an underscore.
_SIDE_SETTING, _FRAMES_SETTING = "_sample_size", "_sample_frames"

# AutoencoderKLHunyuanVideo.__init__: the extent of a tile, and how far on the next one begins
_TILE_FRAMES, _TILE_PIXELS = (16, 12), (256, 192)

_ROPE_AXES = (16, 56, 56)  # HunyuanVideoTransformer3DModel's default


def rope_axes(configs: Configs) -> tuple[int, ...]:
    """Width of each RoPE axis (frame, row, column) within an attention head."""
    return tuple(configs["transformer"].get("rope_axes_dim", _ROPE_AXES))


def _patch(configs: Configs) -> int:
    """Latent rows, and columns, of one token."""
    return int(setting(configs, "transformer", "patch_size"))


def _multiple(configs: Configs) -> int:
    return _patch(configs) * int(setting(configs, "vae", "spatial_compression_ratio"))


def _longest_side(configs: Configs) -> int:
    return AXIS_POSITIONS * _multiple(configs)


def _default_side(configs: Configs) -> int:
    return int(configs["vae"].get(_SIDE_SETTING, _TRAINED_SIDE))


def _default_text_tokens(configs: Configs) -> int:
    """The pipeline's, or what is left of the encoder's positions after the template."""
    positions = configs["text_encoder"].get("max_position_embeddings", _LLAMA_POSITIONS)
    return min(_PIPELINE_TEXT_TOKENS, int(positions) - _TEMPLATE_TOKENS)


def _frames(configs: Configs) -> FrameRule:
    stride = int(setting(configs, "vae", "temporal_compression_ratio"))
    return FrameRule(
        stride=stride,
        longest=(AXIS_POSITIONS - 1) * stride + 1,
        default=int(configs["vae"].get(_FRAMES_SETTING, _PIPELINE_FRAMES)),
        per_second=24.0,  # what sample_video.py of HunyuanVideo's authors saves at
    )


def _symbols(configs: Configs, size: Size) -> dict[str, int]:
    return grid_symbols(
        size,
        unit=_multiple(configs),
        patch=_patch(configs),
        frame_stride=_frames(configs).stride,
    )


def _guidance(configs: Configs) -> Guidance:
    if configs["transformer"].get("guidance_embeds", True):
        return Guidance(rule="embedded", default_scale=6.0)  # HunyuanVideoPipeline.__call__
    return Guidance(rule="none", default_scale=None)


def _latent_channels(configs: Configs) -> int:
    """`ExportError` where the network is not one that makes video from text alone."""
    transformer, channels = configs["transformer"], setting(configs, "vae", "latent_channels")
    found = setting(configs, "transformer", "in_channels")
    if found != channels or transformer.get("image_condition_type") is not None:
        raise ExportError(
            f"the VAE has {channels} latent channels, so a text-to-video transformer takes as "
            f"many and no image, but its config.json says in_channels {found} and "
            f"image_condition_type {transformer.get('image_condition_type')}; image-to-video "
            "checkpoints are not supported"
        )
    if transformer.get("patch_size_t", 1) != 1:
        raise ExportError(
            f"transformer/config.json says patch_size_t {transformer['patch_size_t']}; expected 1, "
            "one latent frame a token, as HunyuanVideo has"
        )
    return int(channels)


def _signatures(configs: Configs) -> Signatures:
    features = setting(configs, "transformer", "text_embed_dim")
    pooled = setting(configs, "transformer", "pooled_projection_dim")
    table = ("latent_frames", "latent_rows", "latent_columns", sum(rope_axes(configs)))
    return signatures(
        video(_latent_channels(configs)),
        Text(
            {"encoder_hidden_states": ("text_tokens", features), "pooled_projections": (pooled,)},
            "encoder_attention_mask",
        ),
        {"rope_cos": table, "rope_sin": table},
        is_embedded=_guidance(configs).rule == "embedded",
    )


def _tiling(configs: Configs) -> Tiling:
    frames = _frames(configs).stride
    pixels = int(setting(configs, "vae", "spatial_compression_ratio"))
    return Tiling(
        time=causal_time_axis(*_TILE_FRAMES, unit=frames, latent_axis=2, image_axis=2),
        space=space_axes(*_TILE_PIXELS, unit=pixels, latent_axis=3, image_axis=3),
    )


HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    pipelines=("HunyuanVideoPipeline",),
    transformer_class="HunyuanVideoTransformer3DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    vae_class="AutoencoderKLHunyuanVideo",
    text_components=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    grid="linspace_to_zero",
    timestep_scale=1.0,
    guidance_argument="guidance_scale",
    text_tokens_argument="max_sequence_length",
    guidance=_guidance,
    default_text_tokens=_default_text_tokens,
    multiple=_multiple,
    longest_side=_longest_side,
    default_side=_default_side,
    symbols=_symbols,
    signatures=_signatures,
    frames=_frames,
    float16_overflow="github.com/Tencent-Hunyuan/HunyuanVideo/issues/60",
    tiling=_tiling,
)
