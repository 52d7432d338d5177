"""Decoding by diffusers' `AutoencoderKL`, as the pipelines do it after their loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn


class Decoder(nn.Module):
    """Pictures (B, 3, H, W) of a latent, black 0 and white 1, not clipped, float32.

    `unpack` makes (B, C, Hl, Wl) of the latent as the graph takes it.
    """

    def __init__(self, vae: nn.Module, unpack: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.network = vae
        self.unpack = unpack

    def forward(self, latent: Tensor) -> Tensor:
        vae: Any = self.network
        unpacked = latent if self.unpack is None else self.unpack(latent)
        unscaled = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        image: Tensor = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
        return image.float() * 0.5 + 0.5  # VaeImageProcessor.denormalize, which clips afterwards


def decoder_graph(vae: nn.Module) -> nn.Module:
    """`Decoder` of a latent that is not packed."""
    return Decoder(vae)


def reference_image(
    vae: nn.Module,
    latent: Tensor,
    symbols: Mapping[str, int],  # noqa: ARG001
) -> Tensor:
    """What pipelines do with it after their loop, up to pictures in [0, 1]: for parity."""
    model: Any = vae
    unscaled = (latent / model.config.scaling_factor) + model.config.shift_factor
    image: Tensor = model.decode(unscaled, return_dict=False)[0]
    pictures: Tensor = VaeImageProcessor().postprocess(image, output_type="pt")
    return pictures
