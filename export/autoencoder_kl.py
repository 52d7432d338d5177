"""AutoencoderKL, the VAE of FLUX.1 and Z-Image: its sizes, its tiles, and how pipelines decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meancache_trt.export.family import Configs, setting
from meancache_trt.export.tiles import space_axes
from meancache_trt.manifest import Tiling

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE_SIZE = 32  # AutoencoderKL's default


def factor(configs: Configs) -> int:
    """Pixels a side of a latent position: the pipelines halve for each block after the first."""
    return int(2 ** (len(setting(configs, "vae", "block_out_channels")) - 1))


def default_side(configs: Configs) -> int:
    """What it was trained at: 1024 in FLUX.1 and Z-Image, which is their pipelines' default too."""
    return int(configs["vae"].get("sample_size", _SAMPLE_SIZE))


def tiling(configs: Configs, *, unit: int, latent_axis: int) -> Tiling:
    """Tiles of the training size overlap by a quarter (its __init__ and tiled_decode).

    For `unit` and `latent_axis` see `tiles.space_axes`.
    """
    tile = default_side(configs)
    stride = tile - int(tile * 0.25)
    return Tiling(space=space_axes(tile, stride, unit=unit, latent_axis=latent_axis, image_axis=2))


def decoded(vae: Any, latent: Tensor) -> Tensor:
    """Latent (B, C, Hl, Wl) to pictures, black 0 and white 1, not clipped."""
    unscaled = latent / vae.config.scaling_factor + vae.config.shift_factor
    image: Tensor = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
    return image.float() * 0.5 + 0.5  # VaeImageProcessor.denormalize, which clips afterwards
