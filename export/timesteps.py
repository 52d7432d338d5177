"""Sinusoidal timestep frequencies as constants that torch computed.

Traced as they stand, they are computed by whatever folds or runs the graph, whose exp may differ
from torch's in the last bit; times a timestep of 1000 that is 6e-5 in phase, the largest part of
an exported transformer's error (measured on a tiny FLUX: 2.9e-5 with, 8e-7 without).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
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
