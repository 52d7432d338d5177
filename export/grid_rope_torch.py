"""Position tables of videos: frames, rows and columns each have a part of the rotated channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Embed = Callable[[Tensor], Sequence[Tensor]]
"""diffusers' own embedding, of a latent (1, C, F, Hl, Wl): cosines and sines (tokens, width)."""


class GridPreparation(nn.Module):
    """Passes a video's noise through, and assembles its tables from one an axis.

    Args:
        embed: see `Embed`.
        axes: how many channels of a table each axis has.
        positions: how many frames, rows and columns of tokens there may be.
        patch: latent rows, and columns, of a token.
        is_guided: whether to give the latent twice as well.
    """

    def __init__(
        self,
        embed: Embed,
        axes: Sequence[int],
        *,
        positions: int,
        patch: int,
        is_guided: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.is_guided = patch, is_guided
        for axis in range(3):
            extents = [1, patch, patch]
            extents[axis] *= positions
            for name, table in zip(("cos", "sin"), embed(torch.empty(1, 1, *extents)), strict=True):
                part = torch.split(table, list(axes), dim=-1)[axis]
                self.register_buffer(f"{name}_{axis}", part.contiguous(), persistent=False)

    def _table(self, name: str, extents: Sequence[int]) -> Tensor:
        parts = []
        for axis, extent in enumerate(extents):
            table = self.get_buffer(f"{name}_{axis}")[:extent]
            shape = [1, 1, 1, table.shape[-1]]
            shape[axis] = extent
            parts.append(table.reshape(shape).expand(*extents, -1))
        return torch.cat(parts, dim=-1)

    def forward(self, noise: Tensor) -> tuple[Tensor, ...]:
        """The latent, if guided the same twice, and `grid_tables`."""
        _, _, frames, height, width = noise.shape
        extents = (frames, height // self.patch, width // self.patch)
        twice = [torch.cat([noise, noise])] if self.is_guided else []
        return noise.clone(), *twice, self._table("cos", extents), self._table("sin", extents)


def grid_tables(embed: Embed, latent: Tensor, patch: int) -> dict[str, Tensor]:
    """`embed`'s tables (frames, rows, columns, width), by the names of the graph's inputs."""
    frames, height, width = latent.shape[2:]
    grid = (frames, height // patch, width // patch)
    tables = (table.reshape(*grid, -1) for table in embed(latent))
    return dict(zip(("rope_cos", "rope_sin"), tables, strict=True))


def positions(arguments: Mapping[str, Any]) -> tuple[tuple[int, ...]]:
    """Frames, rows and columns of the latent."""
    return (tuple(arguments["hidden_states"].shape[2:]),)
