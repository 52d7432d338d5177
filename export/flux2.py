"""FLUX.2 (dev): guidance is embedded, text tokens have places, mu depends on the steps too."""

from __future__ import annotations

from meancache_trt.errors import ExportError
from meancache_trt.export.autoencoder_kl import latent_pixels, tiling
from meancache_trt.export.family import Configs, Family, Signatures, Size, setting
from meancache_trt.export.packing import PACK
from meancache_trt.export.signatures import Latents, Text, grid_symbols, signatures
from meancache_trt.manifest import Guidance, Tiling

AXIS_POSITIONS = 512
"""Places that the prepare graph's tables have on each axis: 8192 pixels a side, and this text."""

_DEFAULT_SIDE = 128  # Flux2Pipeline.default_sample_size, in positions of the unpacked latent

_ROPE_AXES = (32, 32, 32, 32)  # Flux2Transformer2DModel.__init__


def rope_axes(configs: Configs) -> tuple[int, ...]:
    """Width of each RoPE axis (picture, row, column, text token) within an attention head."""
    return tuple(configs["transformer"].get("axes_dims_rope", _ROPE_AXES))


def _multiple(configs: Configs) -> int:
    return PACK * latent_pixels(configs)


def _symbols(configs: Configs, size: Size) -> dict[str, int]:
    return grid_symbols(size, unit=_multiple(configs))


def _guidance(configs: Configs) -> Guidance:
    if configs["transformer"].get("guidance_embeds", True):
        return Guidance(rule="embedded", default_scale=4.0)  # Flux2Pipeline.__call__
    return Guidance(rule="none", default_scale=None)


def _channels(configs: Configs) -> int:
    """Channels of the packed latent; `ExportError` where VAE and transformer disagree."""
    channels = setting(configs, "vae", "latent_channels")
    packed = setting(configs, "transformer", "in_channels")
    if packed != channels * PACK * PACK:
        raise ExportError(
            f"the VAE has {channels} latent channels, so the transformer's in_channels should be "
            f"{channels * PACK * PACK}, but its config.json says {packed}; this is not a FLUX.2 "
            "checkpoint"
        )
    return int(packed)


def _signatures(configs: Configs) -> Signatures:
    channels, width = _channels(configs), 2 * sum(rope_axes(configs))
    grid = ("latent_rows", "latent_columns")
    features = setting(configs, "transformer", "joint_attention_dim")
    return signatures(
        # The noise is drawn packed: Flux2Pipeline.prepare_latents.
        Latents((channels, *grid), ("image_tokens", channels), (*grid, channels)),
        Text({"encoder_hidden_states": ("text_tokens", features)}),
        {"image_rope": ("image_tokens", width), "text_rope": ("text_tokens", width)},
        is_embedded=_guidance(configs).rule == "embedded",
        sizes_from=("encoder_hidden_states",),
    )


def _tiling(configs: Configs) -> Tiling:
    return tiling(configs, unit=_multiple(configs), latent_axis=1)


FLUX2 = Family(
    name="flux2",
    pipelines=("Flux2Pipeline",),
    transformer_class="Flux2Transformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    vae_class="AutoencoderKLFlux2",
    text_components=("tokenizer", "text_encoder"),
    grid="linspace",
    mu="empirical",
    timestep_scale=1 / 1000,
    guidance_argument="guidance_scale",
    text_tokens_argument="max_sequence_length",
    guidance=_guidance,
    default_text_tokens=lambda _: 512,  # Flux2Pipeline.__call__
    longest_text_tokens=AXIS_POSITIONS,
    multiple=_multiple,
    longest_side=lambda configs: AXIS_POSITIONS * _multiple(configs),
    default_side=lambda configs: _DEFAULT_SIDE * latent_pixels(configs),
    symbols=_symbols,
    signatures=_signatures,
    tiling=_tiling,
    latents_argument=lambda latent, size: latent.mT.reshape(-1, *size.noise_shape),
)
