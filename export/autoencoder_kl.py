"""What families whose VAE is diffusers' `AutoencoderKL` have in common, without torch."""

from __future__ import annotations

from meancache_trt.export.family import Configs, setting
from meancache_trt.export.tiles import space_axes
from meancache_trt.manifest import Tiling

_SAMPLE_SIZE = 32  # AutoencoderKL's default


def latent_pixels(configs: Configs) -> int:
    """Pixels that one position of the unpacked latent has a side."""
    # As the pipelines have it: one halving for each block after the first.
    return int(2 ** (len(setting(configs, "vae", "block_out_channels")) - 1))


def sample_size(configs: Configs) -> int:
    """The side of the pictures that the VAE was trained on, in pixels."""
    return int(configs["vae"].get("sample_size", _SAMPLE_SIZE))


def tiling(configs: Configs, *, unit: int, latent_axis: int) -> Tiling:
    """The tiles of pictures (B, 3, H, W); for `unit` and `latent_axis` see `space_axes`."""
    # AutoencoderKL.__init__ and tiled_decode: tiles of the training size overlap by a quarter.
    tile = sample_size(configs)
    stride = tile - int(tile * 0.25)
    return Tiling(space=space_axes(tile, stride, unit=unit, latent_axis=latent_axis, image_axis=2))
