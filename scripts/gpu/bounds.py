"""How far a backend may be from the reference, and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Bound:
    """A bound and its reason."""

    value: float
    reason: str


_ROUNDED = (
    "torch with the network in bfloat16 against float32, on the CPU, over 12 pictures of the three "
    "stand-ins at 10 steps: {}"
)

LATENTS = {
    "float32": Bound(
        1e-3, "ten times what ONNX Runtime keeps to diffusers on the CPU; TF32 would be over it"
    ),
    "bfloat16": Bound(0.5, _ROUNDED.format("0.25 at most; twice that")),
    "float16": Bound(0.5, "as bfloat16, which rounds more coarsely"),
}
"""Largest absolute difference of final latents, which reach 5.6."""

PSNR = {
    "float32": Bound(58.0, "rounding a picture to 8 bits alone gives 58.9 dB"),
    "bfloat16": Bound(36.0, _ROUNDED.format("42.4 dB at worst; 6 dB are a factor of two")),
    "float16": Bound(36.0, "as bfloat16, which rounds more coarsely"),
}
"""Decibels of pictures against the reference's."""

BATCH = {
    "float32": LATENTS["float32"],
    "bfloat16": Bound(0.5, "a batch may run other kernels, which round otherwise, as above"),
    "float16": Bound(0.5, "as bfloat16"),
}
"""Largest absolute difference of the latents of a batch and of single pictures."""

SAME_WORK = "the same kernels on the same numbers in the same order"

UPDATE_ULPS = Bound(
    4.0,
    "one rounding a product and a sum, in units of the last place of the largest partial sum; a "
    "backend may fuse the two, or add in another order",
)

MIB = 2**20
LEAK = Bound(
    64 * MIB,
    "the driver and the libraries keep pools that grow by some MiB; a session that stayed would "
    "be over it after two cycles at full size and after a hundred of the stand-ins",
)


def largest_difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Max |a - b|; NaN where either holds one."""
    return float(np.abs(a.astype(np.float64) - b).max())


def psnr(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Decibels of pictures in [0, 1]; the mean squared error counts as at least 1e-10."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return float(-10 * np.log10(max(error, 1e-10)))
