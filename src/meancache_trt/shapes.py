"""The sizes that a bundle is for: single ones, and the range of each that a plan must cover."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from meancache_trt.errors import InputError

_SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})(?:x([0-9]{1,9}))?")
_RANGE = re.compile(r"([0-9]{1,9})(?:/([0-9]{1,9})/([0-9]{1,9}))?")


@dataclass(frozen=True)
class PictureSize:
    """Height and width in pixels, and the frames of a video; as text 1280x720 or 1280x720x129."""

    height: int
    width: int
    frames: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES. Raises `InputError` for anything else."""
        found = _SIZE.fullmatch(text.strip())
        if found is None:
            raise InputError(
                "a resolution is WIDTHxHEIGHT, such as 1280x720, or WIDTHxHEIGHTxFRAMES, such as "
                f"1280x720x129; found {text!r}"
            )
        width, height, frames = found.groups()
        return cls(int(height), int(width), None if frames is None else int(frames))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames else "")


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The smallest, the usual and the largest value of a size, as trtexec's MIN/OPT/MAX.

    Raises `InputError` where they are not ascending or the first is below 1.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(
                "a range is MIN/OPT/MAX, ascending and at least 1, such as 1/2/4, or one number "
                f"for all three; found {self.min}/{self.opt}/{self.max}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read MIN/OPT/MAX, or one number for all three. Raises `InputError` otherwise."""
        found = _RANGE.fullmatch(text.strip())
        if found is None:
            raise InputError(
                "a range is MIN/OPT/MAX, such as 1/2/4, or one number for all three; found "
                f"{text!r}"
            )
        smallest, usual, largest = found.groups()
        return cls(int(smallest), int(usual or smallest), int(largest or smallest))

    @property
    def ends(self) -> tuple[int, int, int]:
        """Its three values, ascending."""
        return self.min, self.opt, self.max

    @classmethod
    def over(cls, values: Sequence[int]) -> Self:
        """The range of `values`, of which the first is the usual one."""
        return cls(min(values), values[0], max(values))

    def __str__(self) -> str:
        return f"{self.min}/{self.opt}/{self.max}"


ONE = Range(1, 1, 1)
"""One picture at a time."""


_BUCKETS, _BUCKET_UNIT = 4, 8


def text_buckets(text_tokens: int) -> tuple[int, ...]:
    """The lengths to which prompts of at most `text_tokens` are padded, ascending, that one last.

    It, its half, its quarter and its eighth, rounded up to multiples of 8: 64, 128, 256 and 512 of
    512. Each has memory of its own in a host, so they are few; below an eighth there is little to
    gain beside the thousands of tokens of a picture. Tensor cores take 16-bit values in rows of 8.
    """
    halved = (-(-text_tokens // 2**times) for times in range(1, _BUCKETS))
    rounded = (-(-length // _BUCKET_UNIT) * _BUCKET_UNIT for length in halved)
    return tuple(sorted({text_tokens, *(length for length in rounded if length < text_tokens)}))


class Ranges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a TensorRT profile is given: batch, pixels, frames of a video, and text tokens."""

    batch: Range = ONE
    height: Range
    width: Range
    frames: Range | None = None
    text_tokens: Range

    @classmethod
    def covering(cls, sizes: Sequence[PictureSize], *, text_tokens: int, batch: Range) -> Self:
        """The ranges of all `sizes`, the first being the usual one, at one text length."""
        frames = [size.frames for size in sizes if size.frames is not None]
        return cls(
            batch=batch,
            height=Range.over([size.height for size in sizes]),
            width=Range.over([size.width for size in sizes]),
            frames=Range.over(frames) if frames else None,
            text_tokens=Range.over([text_tokens]),
        )
