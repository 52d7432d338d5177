"""The HunyuanVideo stand-in's autoencoder: that of the FLUX stand-in, given a sense of time.

Every 2D kernel becomes the latest tap of a causal 3D one, whose other taps start at zero. Such a
network sees every fourth frame and shows it four times; training on drawn videos does the rest, in
a fraction of the time that it takes from scratch.
"""

from __future__ import annotations

from collections.abc import Iterator

import autoencoder as training
import moving_shapes
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from torch import Tensor

from meancache_trt import standins
from meancache_trt.standins.video_captions import all_scenes


def options(seconds: float) -> training.AutoencoderOptions:
    """For weights that are mostly trained already."""
    return training.AutoencoderOptions(seconds=seconds, batch_size=4, learning_rate=1e-3)


def build() -> AutoencoderKLHunyuanVideo:
    """From 9 x 48 x 48 pixels to 3 x 12 x 12 latents, with the pictures' weights."""
    pictures = AutoencoderKL.from_pretrained(standins.path("flux") / "vae").float()
    stages = len(pictures.config.block_out_channels)
    model = AutoencoderKLHunyuanVideo(
        latent_channels=pictures.config.latent_channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * stages,
        up_block_types=("HunyuanVideoUpBlock3D",) * stages,
        block_out_channels=pictures.config.block_out_channels,
        layers_per_block=pictures.config.layers_per_block,
        norm_num_groups=pictures.config.norm_num_groups,
        spatial_compression_ratio=training.SCALE_FACTOR,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
        scaling_factor=pictures.config.scaling_factor,
    )
    model.load_state_dict(_inflated(pictures.state_dict(), model.state_dict()))
    with torch.no_grad():  # the class has no shift
        model.quant_conv.bias[: model.config.latent_channels] = -pictures.config.shift_factor
        model.post_quant_conv.bias.fill_(pictures.config.shift_factor)
    return model


def _inflated(flat: dict[str, Tensor], deep: dict[str, Tensor]) -> dict[str, Tensor]:
    """The 2D weights under the 3D network's names; its 1 x 1 convolutions pass values on."""
    return {
        name: _identity(tensor)
        if "quant_conv" in name
        else _last_tap(name, flat[_flat_name(name)], tensor)
        for name, tensor in deep.items()
    }


def _flat_name(name: str) -> str:
    """`conv1.conv.weight` is the 3D name of `conv1.weight`."""
    *path, last = name.split(".")
    return ".".join([*path[:-1], last] if path[-1] == "conv" else [*path, last])


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like)).reshape(like.shape) if like.ndim > 1 else torch.zeros_like(like)


def _last_tap(name: str, kernel: Tensor, like: Tensor) -> Tensor:
    if kernel.ndim == like.ndim:
        return kernel
    if "downsamplers" in name:  # where the 2D class pads on one side, the 3D class on both
        kernel = _recentred(_recentred(kernel).transpose(2, 3)).transpose(2, 3)
    inflated = torch.zeros_like(like)
    inflated[:, :, -1] = kernel
    return inflated


def _recentred(kernel: Tensor) -> Tensor:
    """Rows 0, 1 and 2 after the stride's pixel, as far as rows -1, 0 and 1 go."""
    first, second, third = kernel.unbind(2)
    return torch.stack([torch.zeros_like(first), first, second + third], 2)


def all_videos(batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of `moving_shapes.videos` of every scene."""
    return moving_shapes.videos(all_scenes(), batch_size, generator)


def train(
    model: AutoencoderKLHunyuanVideo, options: training.AutoencoderOptions
) -> dict[str, float]:
    """Trains in place and returns measurements.

    Each channel of the latents then has the mean and variance that it had before, so that the
    pictures' transformer, from which training goes on, finds what it knows.
    """
    _, videos = next(all_videos(128, torch.Generator().manual_seed(2)))
    before = _channels(model, videos)
    measurements = training.train(model, options, all_videos)
    _align(model, _channels(model, videos), before)
    return measurements


def _channels(model: AutoencoderKLHunyuanVideo, videos: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, `(C,)`."""
    latents = training.encode(model, videos)
    return latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))


@torch.no_grad()
def _align(
    model: AutoencoderKLHunyuanVideo,
    found: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
) -> None:
    """Folds a scale and a shift of each channel into the convolutions on both of its sides."""
    channels, unit = len(found[0]), 1 / model.config.scaling_factor
    scale = wanted[1] / found[1]
    shift = (wanted[0] - found[0] * scale) * unit
    model.quant_conv.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    model.quant_conv.bias[:channels] = model.quant_conv.bias[:channels] * scale + shift
    model.post_quant_conv.bias -= model.post_quant_conv.weight.flatten(1) @ (shift / scale)
    model.post_quant_conv.weight /= scale.view(1, -1, 1, 1, 1)
