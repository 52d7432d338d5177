"""Flow-matching pieces shared by the stand-ins: data pool, noise levels, EMA, optimisers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import workers
from autoencoder import Autoencoder, encode, pictures
from torch import Tensor, nn

from meancache_trt.standins.captions import random_caption, training_scenes


@dataclass(frozen=True)
class Batch:
    """Packed latents `(B, N, D)` and the caption's ids `(B, L)` for each tokenizer."""

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


def build_pool(
    autoencoder: Autoencoder,
    tokenize: Sequence[Callable[[Sequence[str]], Tensor]],
    pack: Callable[[Tensor], Tensor],
    size: int,
    seed: int,
) -> Pool:
    """Draws, encodes, packs and captions `size` training pictures."""
    scenes, rng = training_scenes(), random.Random(seed)
    source = pictures(scenes, 256, torch.Generator().manual_seed(seed))
    latents, captions = [], []
    for _ in range(size // 256):
        rows, pixels = next(source)
        latents.append(pack(encode(autoencoder, pixels)))
        captions += [random_caption(scenes[row], rng) for row in rows.tolist()]
    return Pool(
        torch.cat(latents),
        tuple(token_ids(captions) for token_ids in tokenize),
        tuple(token_ids([""]) for token_ids in tokenize),
    )


def sample_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels `(B,)`: four in five logit-normal with mean 0.8, which suits shift 3."""
    logit_normal = torch.sigmoid(torch.randn(count, generator=generator) + 0.8)
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.2, uniform, logit_normal)


def noised(latents: Tensor, sigmas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The latents at their noise levels, and the velocity that leads there from the image."""
    noise = torch.randn(latents.shape, generator=generator)
    return torch.lerp(latents, noise, sigmas.view(-1, 1, 1)), noise - latents


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
