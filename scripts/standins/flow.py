"""Flow-matching pieces shared by the stand-ins: data pool, noise levels, EMA, optimisers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import workers
from autoencoder import Autoencoder, encode, pictures
from torch import Tensor, nn

from meancache_trt.standins.captions import random_caption, training_scenes

POOL_BATCH = 256


@dataclass(frozen=True)
class World:
    """Captioned scenes to train on, their endless batches of pixels, and their wordings."""

    scenes: list[Any]
    batches: Callable[[list[Any], int, torch.Generator], Iterator[tuple[Tensor, Tensor]]]
    caption: Callable[[Any, random.Random], str]


@dataclass(frozen=True)
class Batch:
    """Latents as the model takes them, and the captions' ids `(B, N)` for each tokenizer."""

    latents: Tensor
    token_ids: tuple[Tensor, ...]


@dataclass(frozen=True)
class Pool:
    """Encoded captioned pictures kept in memory, so that a training step draws nothing."""

    latents: Tensor
    token_ids: tuple[Tensor, ...]
    empty_ids: tuple[Tensor, ...]

    def batches(self, size: int, dropout: float, generator: torch.Generator) -> Iterator[Batch]:
        """Endless random batches; a caption is the empty one with probability `dropout`."""
        while True:
            rows = torch.randint(len(self.latents), (size,), generator=generator)
            is_dropped = torch.rand(size, 1, generator=generator) < dropout
            ids = zip(self.token_ids, self.empty_ids, strict=True)
            token_ids = tuple(torch.where(is_dropped, empty, table[rows]) for table, empty in ids)
            yield Batch(self.latents[rows].float(), token_ids)


def picture_world() -> World:
    """The pictures outside ``heldout``."""
    return World(training_scenes(), pictures, random_caption)


def build_pool(
    autoencoder: Autoencoder,
    tokenize: Sequence[Callable[[Sequence[str]], Tensor]],
    size: int,
    world: World,
) -> Pool:
    """Draws, encodes and captions this worker's share of `size` pictures or videos."""
    seed = 5 + workers.rank()
    rng = random.Random(seed)
    source = world.batches(world.scenes, POOL_BATCH, torch.Generator().manual_seed(seed))
    latents, captions = [], []
    for _ in range(size // workers.count() // POOL_BATCH):
        rows, pixels = next(source)
        latents.append(encode(autoencoder, pixels))
        captions += [world.caption(world.scenes[row], rng) for row in rows.tolist()]
    print("pool ready", flush=True)
    return Pool(
        torch.cat(latents),
        tuple(token_ids(captions) for token_ids in tokenize),
        tuple(token_ids([""]) for token_ids in tokenize),
    )


def sample_sigmas(count: int, generator: torch.Generator, mean: float = 0.8) -> Tensor:
    """Noise levels `(B,)`: four in five logit-normal; a mean of 0.8 suits shift 3."""
    logit_normal = torch.sigmoid(torch.randn(count, generator=generator) + mean)
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.2, uniform, logit_normal)


def noised(latents: Tensor, sigmas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The latents at their noise levels, and the velocity that leads there from the image."""
    noise = torch.randn(latents.shape, generator=generator)
    return torch.lerp(latents, noise, per_sample(sigmas, latents)), noise - latents


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values `(B,)` with as many dimensions as `like`, so that they broadcast."""
    return values.view(-1, *[1] * (like.ndim - 1))


class Ema:
    """An exponential moving average of a module's parameters, with a warm start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self._decay, self._updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Folds the module's current parameters in."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        averages = list(self.module.parameters())
        torch._foreach_lerp_(averages, list(module.parameters()), 1 - decay)


class Optimizer:
    """Muon for the blocks' matrices, AdamW for everything else, one learning rate."""

    def __init__(self, blocks: nn.Module, others: nn.Module, learning_rate: float) -> None:
        matrices = [p for p in blocks.parameters() if p.requires_grad and p.ndim == 2]
        taken = {id(p) for p in matrices}
        rest = [p for p in others.parameters() if p.requires_grad and id(p) not in taken]
        muon = torch.optim.Muon(
            matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4
        )
        adamw = torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self._optimizers, self._parameters = (muon, adamw), matrices + rest
        self._learning_rate = learning_rate

    def step(self, loss: Tensor, rate: float) -> None:
        """One update at `rate` times the learning rate, with gradients clipped to norm 1."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        workers.average_gradients(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = self._learning_rate * rate
            optimizer.step()
