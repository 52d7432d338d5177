"""How close pictures are to their references."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import InputError

MSE_FLOOR = 1e-10
"""Below this two pictures count as equal: 100 dB, far beyond the 8 bits of a PNG (59 dB)."""


class PsnrSummary(msgspec.Struct, frozen=True, kw_only=True):
    """PSNR over pictures in dB: mean, 5th percentile (linear interpolation) and worst."""

    mean: float
    p5: float
    worst: float


def psnr(pictures: NDArray[Any], references: NDArray[Any]) -> NDArray[np.float64]:
    """PSNR in dB of each picture against its reference, at most 100, shape (N,).

    Args:
        pictures: (N, …), float in [0, 1]; any layout, the same in both.
        references: of the same shape.

    Raises:
        InputError: where there is no picture, shapes differ, or values are not floats in [0, 1].
    """
    if not pictures.size:
        raise InputError("expected at least one picture to compare, found none")
    if pictures.shape != references.shape or pictures.ndim < 2:
        raise InputError(
            f"expected two batches of pictures of one shape, found {pictures.shape} and "
            f"{references.shape}; render both at the same size"
        )
    for batch in (pictures, references):
        _check_range(batch)
    squares = (pictures.astype(np.float64) - references.astype(np.float64)) ** 2
    error = squares.reshape(len(squares), -1).mean(axis=1)
    return np.asarray(-10 * np.log10(np.maximum(error, MSE_FLOOR)))


def compare(pictures: NDArray[Any], references: NDArray[Any]) -> PsnrSummary | None:
    """Summarise `psnr` over the batch, or None where every picture equals its reference.

    Raises `InputError` as `psnr`.
    """
    values = psnr(pictures, references)
    if np.array_equal(pictures, references):
        return None
    return PsnrSummary(
        mean=float(values.mean()),
        p5=float(np.percentile(values, 5)),
        worst=float(values.min()),
    )


def _check_range(batch: NDArray[Any]) -> None:
    is_float = np.issubdtype(batch.dtype, np.floating)
    if not (is_float and batch.min() >= 0 and batch.max() <= 1):
        raise InputError(
            f"expected float pictures in [0, 1], found {batch.dtype} from {batch.min()} to "
            f"{batch.max()}; divide bytes by 255 and check for values that are not finite"
        )
