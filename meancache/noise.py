"""Initial noise that any host can make again, value for value, from a 64-bit seed.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) maps a counter
and a key to four 32-bit words; nothing is carried from one block to the next. The C++ host makes
the same values in `engine/host/noise.hpp`, and `tests/golden/noise.txt` is read by both.

    key     = (seed mod 2^32, seed div 2^32)
    counter = (block mod 2^32, block div 2^32, 0, 0), from block 0 in every sample
    u_k     = (word_k + 1/2) / 2^32
    z_0, z_1 = sqrt(−2 ln u_0) · (cos 2π u_1, sin 2π u_1), and z_2, z_3 likewise from u_2, u_3

Block b holds values 4b to 4b + 3 of the sample, row-major over the unpacked latent, so that a
sample depends neither on its batch nor on the family's packing. Box-Muller runs in float64 and is
rounded once to float32: mathematics libraries that differ in the last float64 bit then still
agree, but for about one value in 10^8.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import InputError, RuntimeUnavailableError

ROUNDS = 10
"""The rounds that the authors recommend; seven already pass BigCrush (SC'11, table 2)."""

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # SC'11, section 4.3
_WEYL = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) − 1, added to the key each round
_MASK = np.uint64(0xFFFFFFFF)
_HALF_WORD = np.uint64(32)

Words = NDArray[np.uint32]


def philox4x32(counters: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of each row of `counters`, shape (N, 4), under one key of two 32-bit words."""
    low, second, high, fourth = counters.astype(np.uint64).T
    for turn in range(ROUNDS):
        keys = [
            np.uint64((word + turn * weyl) % 2**32) for word, weyl in zip(key, _WEYL, strict=True)
        ]
        even, odd = low * _MULTIPLIERS[0], high * _MULTIPLIERS[1]
        low, second = (odd >> _HALF_WORD) ^ second ^ keys[0], odd & _MASK
        high, fourth = (even >> _HALF_WORD) ^ fourth ^ keys[1], even & _MASK
    return np.stack([low, second, high, fourth], axis=1).astype(np.uint32)


def philox_normal(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal noise for one sample, as the module says.

    Args:
        seed: 0 to 2^64 − 1.
        shape: the unpacked latent without its batch, (C, H, W) or (C, F, H, W).

    Raises:
        InputError: where the seed is out of range or a dimension is below 1.
    """
    seed = _check_seed(seed)
    key = seed % 2**32, seed >> 32
    size = math.prod(_check_shape(shape))
    blocks = np.arange(-(-size // 4), dtype=np.uint64)
    counters = np.zeros((len(blocks), 4), np.uint32)
    counters[:, 0] = blocks & _MASK
    counters[:, 1] = blocks >> _HALF_WORD
    uniform = (philox4x32(counters, key) + 0.5) / 2.0**32
    radius = np.sqrt(-2.0 * np.log(uniform[:, ::2]))
    angle = 2.0 * np.pi * uniform[:, 1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return pairs.reshape(-1)[:size].reshape(shape).astype(np.float32)


def torch_normal(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Noise for one sample as a float32 diffusers pipeline draws it from a CPU generator.

    Equals `randn_tensor((1, *shape), torch.Generator("cpu").manual_seed(seed))`, so that a picture
    can be compared with diffusers' own for the same seed. Arguments as for `philox_normal`.

    Raises:
        InputError: where the seed is out of range or a dimension is below 1.
        RuntimeUnavailableError: where torch is not installed.
    """
    seed = _check_seed(seed)
    _check_shape(shape)
    try:
        import torch  # noqa: PLC0415 - only this option needs it
    except ImportError:
        raise RuntimeUnavailableError(
            "noise from torch's generator needs torch, found none; install meancache-trt[text], or "
            "use the noise that every host has"
        ) from None
    generator = torch.Generator("cpu").manual_seed(seed)
    batch = torch.randn((1, *shape), generator=generator, dtype=torch.float32)
    return np.asarray(batch[0].numpy(), np.float32)


def draw_noise(source: str, seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Noise of a source by name, "philox" or "torch". Raises `InputError` for another name."""
    if source not in _SOURCES:
        raise InputError(f"noise is one of {', '.join(_SOURCES)}, found {source!r}")
    return _SOURCES[source](seed, shape)


_SOURCES: dict[str, Callable[[int, Sequence[int]], NDArray[np.float32]]] = {
    "philox": philox_normal,
    "torch": torch_normal,
}


def _check_seed(seed: int) -> int:
    number = operator.index(seed)
    if not 0 <= number < 2**64:
        raise InputError(f"a seed is 0 to {2**64 - 1} (64 bits), found {seed}; choose one in range")
    return number


def _check_shape(shape: Sequence[int]) -> Sequence[int]:
    if not shape or min(shape) < 1:
        raise InputError(
            f"noise fills a latent whose every dimension is 1 or more, found {tuple(shape)}; give "
            "the shape without its batch, such as (16, 128, 128)"
        )
    return shape
