"""Packing as FLUX.1 and Qwen-Image do it: 2 x 2 latent positions are one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PACK = 2


def pack(latent: Tensor) -> Tensor:
    """(B, C, Hl, Wl) to (B, S, 4 C), as the pipelines' _pack_latents."""
    batch, channels, height, width = latent.shape
    rows, columns = height // PACK, width // PACK
    patches = latent.reshape(batch, channels, rows, PACK, columns, PACK)
    packed = PACK * PACK * channels
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, packed)


def unpack(grid: Tensor) -> Tensor:
    """(B, rows, columns, 4 C) to (B, C, Hl, Wl), as the pipelines' _unpack_latents."""
    batch, rows, columns, packed = grid.shape
    channels = packed // (PACK * PACK)
    patches = grid.reshape(batch, rows, columns, channels, PACK, PACK)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * PACK, columns * PACK)
