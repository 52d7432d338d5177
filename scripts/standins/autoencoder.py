"""Phases shared by the stand-ins: a small autoencoder trained on drawn shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import shapes
import torch
import workers
from diffusers import AutoencoderKL
from progress import Budget, RunningMean
from torch import Tensor, nn

from meancache_trt.standins.captions import Scene, all_scenes

SCALE_FACTOR = 4

_CHUNK = 64

Draw = Callable[[int, torch.Generator], Iterator[tuple[Tensor, Tensor]]]
"""Endless batches, of a size, of (indices into scenes, pixels) of the world to be encoded."""

Normalise = Callable[[Any, Tensor], None]
"""Sets an autoencoder's scaling, and shift, by what it makes of pixels."""


class Autoencoder(Protocol):
    """An `nn.Module` that is called like `AutoencoderKL`, of pictures or of videos."""

    @property
    def config(self) -> Any:
        """`scaling_factor`, and `shift_factor` if any: of all channels, or a tensor of each."""

    @property
    def decoder(self) -> nn.Module:
        """What `refine_decoder` trains."""

    def encode(self, pixels: Tensor) -> Any:
        """The posterior, as `latent_dist`."""

    def decode(self, latents: Tensor) -> Any:
        """The pixels, as `sample`."""


@dataclass(frozen=True)
class AutoencoderOptions:
    """Training options; the defaults reach the PSNR stated in the model card."""

    latent_channels: int = 8
    seconds: float = 420
    batch_size: int = 16
    learning_rate: float = 2e-3
    edge_weight: float = 0.5
    kl_weight: float = 5e-4
    latent_noise: float = 0.05
    seed: int = 1


def build(latent_channels: int) -> AutoencoderKL:
    """An untrained autoencoder from 64 x 64 pixels to 16 x 16 latents."""
    stages = 3
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=shapes.IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def pictures(
    scenes: list[Scene], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (indices into `scenes` `(B,)`, pictures `(B, 3, 64, 64)`)."""
    attributes = shapes.attribute_indices(scenes)
    while True:
        rows = torch.randint(len(scenes), (batch_size,), generator=generator)
        yield rows, shapes.draw(attributes[rows], generator)


def all_pictures(batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of `pictures` of every scene."""
    return pictures(all_scenes(), batch_size, generator)


def normalise_together(autoencoder: Autoencoder, pixels: Tensor) -> None:
    """Gives latents unit variance, and zero mean if there is a shift, over all channels."""
    shifts = {"shift_factor": 0.0} if "shift_factor" in autoencoder.config else {}
    autoencoder.register_to_config(scaling_factor=1.0, **shifts)
    latents = encode(autoencoder, pixels)
    autoencoder.register_to_config(
        scaling_factor=round(1 / float(latents.std()), 5),
        **{name: round(float(latents.mean()), 5) for name in shifts},
    )


def train(
    autoencoder: Autoencoder,
    options: AutoencoderOptions,
    draw: Draw = all_pictures,
    normalise: Normalise = normalise_together,
) -> dict[str, float]:
    """Trains the autoencoder in place, normalises its latents and returns measurements."""
    autoencoder.requires_grad_(True)
    if isinstance(autoencoder, AutoencoderKL):
        autoencoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), options.learning_rate, (0.9, 0.99))
    generator = torch.Generator().manual_seed(options.seed + workers.rank())
    batches = draw(options.batch_size, generator)
    budget, loss_mean = workers.shared_budget(options.seconds), RunningMean()
    while not budget.is_spent:
        optimizer.param_groups[0]["lr"] = options.learning_rate * budget.rate(warmup_steps=50)
        loss_mean.add(_step(autoencoder, next(batches)[1], optimizer, options))
        budget.tick(f"autoencoder loss {loss_mean.value:.4f}")
    autoencoder.eval().requires_grad_(False)
    normalise(autoencoder, next(draw(512, torch.Generator().manual_seed(2)))[1])
    return _measurements(autoencoder, budget, loss_mean, draw)


def refine_decoder(
    autoencoder: Autoencoder, options: AutoencoderOptions, draw: Draw = all_pictures
) -> dict[str, float]:
    """Trains the decoder alone on slightly noisy latents, in place; returns measurements.

    The encoder stays as it is, so latents and the transformers trained on them stay valid.
    """
    autoencoder.requires_grad_(False).decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        autoencoder.decoder.parameters(), options.learning_rate, (0.9, 0.99)
    )
    generator = torch.Generator().manual_seed(options.seed + 100 + workers.rank())
    batches = draw(options.batch_size, generator)
    budget, loss_mean = workers.shared_budget(options.seconds), RunningMean()
    while not budget.is_spent:
        optimizer.param_groups[0]["lr"] = options.learning_rate * budget.rate(warmup_steps=50)
        pixels = next(batches)[1]
        latents = encode(autoencoder, pixels)
        latents += options.latent_noise * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = _decode(autoencoder, latents)
        loss_mean.add(_update(autoencoder, _picture_loss(decoded, pixels, options), optimizer))
        budget.tick(f"decoder loss {loss_mean.value:.4f}")
    autoencoder.requires_grad_(False)
    return _measurements(autoencoder, budget, loss_mean, draw)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def psnr_db(autoencoder: Autoencoder, draw: Draw = all_pictures) -> float:
    """Peak signal-to-noise ratio of 256 reconstructions, averaged over pictures or videos."""
    _, pixels = next(draw(256, torch.Generator().manual_seed(3)))
    errors = [
        (_decode(autoencoder, encode(autoencoder, part)).clamp(-1, 1) - part).square().flatten(1)
        for part in pixels.split(_CHUNK)
    ]
    return float((10 * torch.log10(4 / torch.cat(errors).mean(1))).mean())


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def encode(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """Latents as the transformer sees them: shifted and scaled means, `(B, C, 16, 16)` of pictures.

    In chunks, because a large batch of videos spends its time on fetching memory; not compiled,
    because what training compiled is for batches of another size.
    """
    scaling, shift = _scale(autoencoder)
    latents = [autoencoder.encode(part).latent_dist.mode() for part in pixels.split(_CHUNK)]
    return (torch.cat(latents) - shift) * scaling


def _scale(autoencoder: Autoencoder) -> tuple[float | Tensor, float | Tensor]:
    return autoencoder.config.scaling_factor, autoencoder.config.get("shift_factor", 0.0)


def _step(
    autoencoder: Autoencoder,
    pixels: Tensor,
    optimizer: torch.optim.Optimizer,
    options: AutoencoderOptions,
) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = autoencoder.encode(_laid_out(pixels)).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
    kl = posterior.kl().mean() / math.prod(posterior.mean.shape[1:])
    loss = _picture_loss(decoded, pixels, options) + options.kl_weight * kl
    return _update(autoencoder, loss, optimizer)


def _laid_out(pixels: Tensor) -> Tensor:
    """Pictures channels last; videos as they are, which was measured to be faster."""
    is_video = pixels.ndim == 5
    return pixels if is_video else pixels.to(memory_format=torch.channels_last)


def _update(autoencoder: Autoencoder, loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    workers.average_gradients(list(autoencoder.parameters()))
    torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _picture_loss(decoded: Tensor, pixels: Tensor, options: AutoencoderOptions) -> Tensor:
    """Squared error of pixels and of neighbouring pixels' differences, which keeps edges sharp.

    An absolute error converged far slower: the background's many small errors outvote the shape.
    """
    error = decoded.float() - pixels
    edges = error.diff(dim=-2).square().mean() + error.diff(dim=-1).square().mean()
    return error.square().mean() + options.edge_weight * edges


def _decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    scaling, shift = _scale(autoencoder)
    sample: Tensor = autoencoder.decode(latents / scaling + shift).sample
    return sample


def _measurements(
    autoencoder: Autoencoder, budget: Budget, loss_mean: RunningMean, draw: Draw
) -> dict[str, float]:
    return {
        "steps": budget.steps,
        "seconds": budget.elapsed_s,
        "loss": loss_mean.value,
        "psnr_db": psnr_db(autoencoder, draw),
    }
