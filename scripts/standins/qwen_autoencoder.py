"""The Qwen-Image stand-in's autoencoder, as the shared training code takes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from meancache_trt.export.qwen_image_torch import one_frame


def build(latent_channels: int) -> AutoencoderKLQwenImage:
    """An untrained autoencoder from 64 x 64 pixels to 16 x 16 latents."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=latent_channels,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * latent_channels,
        latents_std=[1.0] * latent_channels,
    )


class OneFrame(nn.Module):
    """Adapts the autoencoder of videos to pictures and to `AutoencoderKL`'s interface."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        self.vae = vae

    @property
    def decoder(self) -> nn.Module:
        """The part that `refine_decoder` trains."""
        decoder: nn.Module = self.vae.decoder
        return decoder

    @property
    def config(self) -> FrozenDict:
        """Latent channels, and each channel's factor and shift `(1, C, 1, 1)`."""
        mean, std = (
            torch.tensor(self.vae.config[name]).view(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return FrozenDict(
            latent_channels=self.vae.config.z_dim, scaling_factor=1 / std, shift_factor=mean
        )

    def register_to_config(self, scaling_factor: float, shift_factor: float) -> None:
        """Sets the factor and the shift of all channels."""
        channels = self.vae.config.z_dim
        self._set_statistics([shift_factor] * channels, [1 / scaling_factor] * channels)

    @torch.no_grad()
    def normalise_channels(self, pixels: Tensor) -> None:
        """Sets each channel's factor and shift so that it has zero mean and unit variance."""
        latents = self.encode(pixels).latent_dist.mode()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        self._set_statistics(mean.tolist(), std.tolist())

    def encode(self, pixels: Tensor) -> AutoencoderKLOutput:
        """The posterior of pictures `(B, 3, H, W)` over latents `(B, C, H / 4, W / 4)`."""
        with one_frame():
            moments = self.vae.quant_conv(self.vae.encoder(pixels[:, :, None]))[:, :, 0]
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Pictures, not clipped."""
        with one_frame():
            frames = self.vae.decoder(self.vae.post_quant_conv(latents[:, :, None]))
        return DecoderOutput(sample=frames[:, :, 0])

    def _set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.vae.register_to_config(
            latents_mean=[round(value, 5) for value in mean],
            latents_std=[round(value, 5) for value in std],
        )
