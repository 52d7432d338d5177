"""Wan 2.1 and 2.2: text to video, plain classifier-free guidance, UniPC's grid."""

from __future__ import annotations

from meancache_trt.errors import ExportError
from meancache_trt.export.family import Configs, Family, FrameRule, Signatures, Size, setting
from meancache_trt.export.signatures import Text, grid_symbols, signatures, video
from meancache_trt.export.tiles import space_axes
from meancache_trt.manifest import Guidance, Tiling
from meancache_trt.meancache.sigmas import SecondStage

_PIPELINE_TEXT_TOKENS = 512  # WanPipeline.__call__
_PIPELINE_SCALE = 5.0  # likewise; the card of 2.2 A14B says 4, and 3 for its second transformer

# AutoencoderKLWan.__init__ and WanTransformer3DModel.__init__
_SPATIAL, _TEMPORAL, _POSITIONS, _PATCH = 8, 4, 1024, (1, 2, 2)
_TILE_PIXELS = (256, 192)  # a tile's pixels, and where the next begins

_TRAIN_TIMESTEPS = 1000  # UniPCMultistepScheduler.__init__

# A square near 832 x 480, WanPipeline's default, and to the 1280 x 704 of 2.2 TI2V-5B's
# card, whose VAE alone makes patches; with frames and frames a second, of the pipeline and the
# card.
_TRAINED, _TRAINED_5B = (640, 81, 16.0), (960, 121, 24.0)

# Where vae/config.json says otherwise of its checkpoint; the class has no such settings, and
# diffusers ignores those that begin with an underscore.
_SIDE_SETTING, _FRAMES_SETTING = "_sample_size", "_sample_frames"

# What the transformers of image-to-video and of VACE have
_UNSUPPORTED = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


def positions(configs: Configs) -> int:
    """Frames, rows and columns of tokens that the network's RoPE tables cover."""
    return int(configs["transformer"].get("rope_max_seq_len", _POSITIONS))


def rope_axes(configs: Configs) -> tuple[int, int, int]:
    """Width of each RoPE axis (frame, row, column) within an attention head."""
    width = int(setting(configs, "transformer", "attention_head_dim"))
    side = 2 * (width // 6)
    return width - 2 * side, side, side


def _patch(configs: Configs) -> int:
    """Latent rows, and columns, of one token; `ExportError` where a token has several frames."""
    frames, rows, columns = configs["transformer"].get("patch_size", _PATCH)
    if frames != 1 or rows != columns:
        raise ExportError(
            f"transformer/config.json says patch_size {[frames, rows, columns]}; expected one "
            "latent frame and a square, as Wan 2.1 and 2.2 have"
        )
    return int(rows)


def _is_patched(configs: Configs) -> bool:
    """Whether the VAE is that of Wan 2.2 TI2V-5B."""
    return configs["vae"].get("patch_size") is not None


def _latent_pixels(configs: Configs) -> int:
    return int(configs["vae"].get("scale_factor_spatial", _SPATIAL))


def _multiple(configs: Configs) -> int:
    return _patch(configs) * _latent_pixels(configs)


def _longest_side(configs: Configs) -> int:
    return positions(configs) * _multiple(configs)


def _trained(configs: Configs) -> tuple[int, int, float]:
    return _TRAINED_5B if _is_patched(configs) else _TRAINED


def _default_side(configs: Configs) -> int:
    return int(configs["vae"].get(_SIDE_SETTING, _trained(configs)[0]))


def _frames(configs: Configs) -> FrameRule:
    stride = int(configs["vae"].get("scale_factor_temporal", _TEMPORAL))
    _, frames, per_second = _trained(configs)
    return FrameRule(
        stride=stride,
        longest=(positions(configs) - 1) * stride + 1,
        default=int(configs["vae"].get(_FRAMES_SETTING, frames)),
        per_second=per_second,
    )


def _symbols(configs: Configs, size: Size) -> dict[str, int]:
    return grid_symbols(
        size,
        unit=_multiple(configs),
        patch=_patch(configs),
        frame_stride=_frames(configs).stride,
    )


def _guidance(_: Configs) -> Guidance:
    return Guidance(rule="classifier_free", default_scale=_PIPELINE_SCALE)


def _latent_channels(configs: Configs) -> int:
    """`ExportError` where the network is not one that makes video from text alone."""
    transformer, channels = configs["transformer"], setting(configs, "vae", "z_dim")
    found = {key: setting(configs, "transformer", key) for key in ("in_channels", "out_channels")}
    others = {key: transformer[key] for key in _UNSUPPORTED if transformer.get(key) is not None}
    if set(found.values()) != {channels} or others:
        raise ExportError(
            f"the VAE has {channels} latent channels, so a text-to-video transformer takes and "
            f"makes as many and no image, but its config.json says {found | others}; "
            "image-to-video and control checkpoints are not supported"
        )
    return int(channels)


def _signatures(configs: Configs) -> Signatures:
    features = setting(configs, "transformer", "text_dim")
    table = ("latent_frames", "latent_rows", "latent_columns", sum(rope_axes(configs)))
    return signatures(
        video(_latent_channels(configs)),
        Text({"encoder_hidden_states": ("text_tokens", features)}),
        {"rope_cos": table, "rope_sin": table},
        is_guided=True,
    )


def _tiling(configs: Configs) -> Tiling:
    # With patches, AutoencoderKLWan blends before it takes them apart, which no record can say.
    pixels = _latent_pixels(configs)
    axes = space_axes(*_TILE_PIXELS, unit=pixels, latent_axis=3, image_axis=3)
    return Tiling(space=() if _is_patched(configs) else axes)


def _second_stage(configs: Configs) -> SecondStage | None:
    """Where model_index.json has a boundary_ratio; `ExportError` unless both networks are alike."""
    ratio = configs["model_index"].get("boundary_ratio")
    if ratio is None:
        return None
    first, second = configs["transformer"], configs.get("transformer_2", {})
    other = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    differing = sorted(key for key in other if not key.startswith("_"))
    if differing:
        raise ExportError(
            f"model_index.json has boundary_ratio {ratio}, so transformer and transformer_2 are "
            "two networks of one configuration, found "
            + (f"other {', '.join(differing)}" if second else "no transformer_2")
            + "; download the checkpoint again"
        )
    train_timesteps = configs["scheduler"].get("num_train_timesteps", _TRAIN_TIMESTEPS)
    return SecondStage(boundary_timestep=ratio * train_timesteps)


WAN = Family(
    name="wan",
    pipelines=("WanPipeline",),
    transformer_class="WanTransformer3DModel",
    blocks=("blocks",),
    vae_class="AutoencoderKLWan",
    text_components=("tokenizer", "text_encoder"),
    grid="count",
    timestep_scale=1.0,
    guidance_argument="guidance_scale",
    text_tokens_argument="max_sequence_length",
    guidance=_guidance,
    default_text_tokens=lambda _: _PIPELINE_TEXT_TOKENS,
    multiple=_multiple,
    longest_side=_longest_side,
    default_side=_default_side,
    symbols=_symbols,
    signatures=_signatures,
    frames=_frames,
    tiling=_tiling,
    second_stage=_second_stage,
)
