"""HunyuanVideo: text to video, with a guidance scale that is embedded in the network."""

from __future__ import annotations

from meancache_trt.errors import ExportError
from meancache_trt.export.family import (
    Configs,
    Family,
    FrameRule,
    Signature,
    Signatures,
    Size,
    Wrapper,
    float32,
    setting,
)
from meancache_trt.export.tiles import causal_time_axis, space_axes
from meancache_trt.manifest import Guidance, Role, TensorRecord, Tiling

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
    rows, columns = (pixels // _multiple(configs) for pixels in (size.height, size.width))
    assert size.frames is not None  # `check_size` sees to it
    latent_frames = (size.frames - 1) // _frames(configs).stride + 1
    return {
        "height": size.height,
        "width": size.width,
        "frames": size.frames,
        "latent_frames": latent_frames,
        "latent_height": _patch(configs) * rows,
        "latent_width": _patch(configs) * columns,
        "latent_rows": rows,
        "latent_columns": columns,
        "image_tokens": latent_frames * rows * columns,
        "text_tokens": size.text_tokens,
    }


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


def _latent(configs: Configs, role: Role) -> TensorRecord:
    channels = _latent_channels(configs)
    return float32(role, "batch", channels, "latent_frames", "latent_height", "latent_width")


def _rope(configs: Configs) -> dict[str, TensorRecord]:
    grid = ("latent_frames", "latent_rows", "latent_columns")
    table = float32("prepared", *grid, sum(rope_axes(configs)))
    return {"rope_cos": table, "rope_sin": table}


def _transformer(configs: Configs) -> Signature:
    features = setting(configs, "transformer", "text_embed_dim")
    pooled = setting(configs, "transformer", "pooled_projection_dim")
    inputs = {
        "hidden_states": _latent(configs, "latent"),
        "timestep": float32("timestep", "batch"),
        "encoder_hidden_states": float32("conditioning", "batch", "text_tokens", features),
        "encoder_attention_mask": TensorRecord("bool", ("batch", "text_tokens"), "text_mask"),
        "pooled_projections": float32("conditioning", "batch", pooled),
    }
    if _guidance(configs).rule == "embedded":
        inputs["guidance"] = float32("guidance_scale", "batch")
    return Signature({**inputs, **_rope(configs)}, {"velocity": _latent(configs, "velocity")})


def _signatures(configs: Configs) -> Signatures:
    video = float32("image", "batch", 3, "frames", "height", "width")
    return Signatures(
        transformer=_transformer(configs),
        prepare=Signature(
            {"noise": _latent(configs, "noise")},
            {"latent": _latent(configs, "latent"), **_rope(configs)},
        ),
        vae_decoder=Signature({"latent": _latent(configs, "latent_grid")}, {"video": video}),
    )


def _tiling(configs: Configs) -> Tiling:
    frames = _frames(configs).stride
    pixels = int(setting(configs, "vae", "spatial_compression_ratio"))
    return Tiling(
        time=causal_time_axis(*_TILE_FRAMES, unit=frames, latent_axis=2, image_axis=2),
        space=space_axes(*_TILE_PIXELS, unit=pixels, latent_axis=3, image_axis=3),
    )


def _wrapper() -> Wrapper:
    from meancache_trt.export import hunyuan_video_torch  # noqa: PLC0415  the spec has no torch

    return hunyuan_video_torch


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
    wrapper=_wrapper,
    frames=_frames,
    float16_overflow="github.com/Tencent-Hunyuan/HunyuanVideo/issues/60",
    tiling=_tiling,
)
