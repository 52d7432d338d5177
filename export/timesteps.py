"""Timesteps as exact as they came in: frequencies that torch computed, no rounding on the way.

Traced as they stand, frequencies are computed by whatever folds or runs the graph, whose exp may
differ from torch's in the last bit; times a timestep of 1000 that is 6e-5 in phase, the largest
part of an exported transformer's error (measured on a tiny FLUX: 2.9e-5 with, 8e-7 without).

A network in bfloat16 rounds its timestep to 8 bits before it is embedded, 987 to 988. Its graph
takes the timestep, and an embedded guidance scale, in float32 and rounds their embeddings only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

_MAX_PERIOD = 10000  # the default of diffusers' get_timestep_embedding, which Timesteps leaves


class _FixedTimesteps(nn.Module):
    """`Timesteps`, its frequencies a buffer."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        half = original.num_channels // 2
        exponents = -math.log(_MAX_PERIOD) * torch.arange(0, half, dtype=torch.float32)
        frequencies = torch.exp(exponents / (half - original.downscale_freq_shift))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.scale = original.scale
        self.is_cosine_first = original.flip_sin_to_cos

    def forward(self, timesteps: Tensor) -> Tensor:
        phase = self.scale * (timesteps[:, None].float() * self.get_buffer("frequencies")[None])
        waves = [torch.sin(phase), torch.cos(phase)]
        return torch.cat(waves[::-1] if self.is_cosine_first else waves, dim=-1)


@contextmanager
def fixed_timestep_frequencies(network: nn.Module) -> Iterator[None]:
    """Replace every `Timesteps` in `network` by its equal with a table; leaving restores them."""
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, Timesteps) and child.num_channels % 2 == 0
    ]
    for parent, name, child in found:
        setattr(parent, name, _FixedTimesteps(child))
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


class Times:
    """What a network's timestep embedding is called with first: float32 (B,) each, as set."""

    values: tuple[Tensor, ...] = ()


@contextmanager
def exact_times(embedding: nn.Module) -> Iterator[Times]:
    """Call `embedding` with the yielded `values` in place of its first arguments meanwhile."""
    times, original = Times(), embedding.forward

    def forward(*arguments: Any) -> Any:
        return original(*times.values, *arguments[len(times.values) :])

    hooks = [
        child.register_forward_pre_hook(_rounded)
        for child in embedding.modules()
        if isinstance(child, TimestepEmbedding)
    ]
    embedding.forward = forward
    try:
        yield times
    finally:
        del embedding.forward
        for hook in hooks:
            hook.remove()


def _rounded(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Waves in the network's dtype: FLUX.2 leaves them in that of the timestep."""
    return (arguments[0].to(module.linear_1.weight.dtype), *arguments[1:])
