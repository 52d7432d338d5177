"""Decoding by diffusers' `AutoencoderKL`, as the pipelines do it after their loop."""

from __future__ import annotations

from typing import Any

from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


def decode(vae: Any, latent: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) of an unpacked latent, black 0 and white 1, not clipped, float32."""
    unscaled = latent / vae.config.scaling_factor + vae.config.shift_factor
    image: Tensor = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
    return image.float() * 0.5 + 0.5  # VaeImageProcessor.denormalize, which clips afterwards


def reference_pictures(vae: Any, latent: Tensor) -> Tensor:
    """The same in [0, 1] as the pipelines have it, by diffusers' own processor: for parity."""
    unscaled = (latent / vae.config.scaling_factor) + vae.config.shift_factor
    image: Tensor = vae.decode(unscaled, return_dict=False)[0]
    pictures: Tensor = VaeImageProcessor().postprocess(image, output_type="pt")
    return pictures
