"""The Qwen-Image stand-in's autoencoder, as the shared training code takes it."""

from __future__ import annotations

import autoencoder as training
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from meancache_trt.export.qwen_image_torch import one_frame

KL_WEIGHT = 5e-5
"""At the other stand-ins' 5e-4 a latent channel collapsed, and colours with it."""


def options(seconds: float) -> training.AutoencoderOptions:
    """For a phase of so many seconds."""
    return training.AutoencoderOptions(seconds=seconds, kl_weight=KL_WEIGHT)


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


def build(latent_channels: int) -> OneFrame:
    """An untrained autoencoder from 64 x 64 pixels to 16 x 16 latents."""
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=latent_channels,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * latent_channels,
        latents_std=[1.0] * latent_channels,
    )
    return OneFrame(vae)


def train(model: OneFrame, options: training.AutoencoderOptions) -> dict[str, float]:
    """Trains what `build` returned in place and returns measurements."""
    model.vae.encoder.compile()
    model.vae.decoder.compile()
    return training.train(model, options, normalise=normalise_channels)


def refine_decoder(model: OneFrame, options: training.AutoencoderOptions) -> dict[str, float]:
    """Trains the decoder alone in place and returns measurements."""
    model.vae.decoder.compile()
    return training.refine_decoder(model, options)


def normalise_channels(model: OneFrame, pixels: Tensor) -> None:
    """Gives each channel of the latents, unscaled until now, zero mean and unit variance."""
    latents = training.encode(model, pixels)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    model.vae.register_to_config(
        latents_mean=[round(value, 5) for value in mean.tolist()],
        latents_std=[round(value, 5) for value in std.tolist()],
    )
