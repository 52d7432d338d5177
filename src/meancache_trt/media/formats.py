"""The choice of a file format, and what it can hold; checked before anything is rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, cast, get_args

from meancache_trt.errors import InputError
from meancache_trt.media.video import import_av
from meancache_trt.shapes import PictureSize

FormatName = Literal["png", "jpeg", "webp", "mp4", "latents"]

_SUFFIXES: dict[FormatName, tuple[str, ...]] = {
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "mp4": (".mp4",),
    "latents": (".safetensors",),
}
OUTPUT_SUFFIXES = frozenset(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
"""Of files that `read_metadata` reads."""

_DEFAULT_QUALITY: dict[FormatName, int] = {
    "jpeg": 95,  # Pillow advises against more: larger files, hardly better pictures
    "webp": 90,
    "mp4": 66,  # CRF 18, which FFmpeg's guide to H.264 calls visually lossless or nearly so
}
_LONGEST_SIDE: dict[FormatName, int] = {
    "jpeg": 65500,  # libjpeg's JPEG_MAX_DIMENSION
    "webp": 16383,  # 14 bits in the file
}


@dataclass(frozen=True)
class OutputFormat:
    """A file format and, where it loses something, the quality from 1 to 100.

    `png` is lossless, and so is `webp` at quality 100; both animate a video's frames. `jpeg` is
    for pictures and `mp4` (H.264, yuv420p) for videos. `latents` are what the denoising loop left,
    as float32 in safetensors. Raises `InputError` for another name or a quality that does not fit.
    """

    name: FormatName
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _SUFFIXES:
            raise InputError(
                f"expected a format of {', '.join(get_args(FormatName))}, found {self.name!r}"
            )
        if self.quality is None:
            return
        if self.name not in _DEFAULT_QUALITY:
            raise InputError(f"{self.name} loses nothing and takes no quality; leave it out")
        if not 1 <= self.quality <= 100:
            raise InputError(f"expected a quality from 1 to 100, found {self.quality}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read NAME or NAME:QUALITY, such as jpeg:90. Raises `InputError` for anything else."""
        name, colon, quality = text.partition(":")
        if colon and not (quality.isascii() and quality.isdecimal()):
            raise InputError(f"expected a format such as png or jpeg:90, found {text!r}")
        return cls(cast(FormatName, name), int(quality) if colon else None)

    @classmethod
    def of_suffix(cls, path: Path) -> Self:
        """The format that a file's suffix means. Raises `InputError` for one without a format."""
        for name, suffixes in _SUFFIXES.items():
            if path.suffix.lower() in suffixes:
                return cls(name)
        known = ", ".join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
        raise InputError(f"expected a file that ends in one of {known}, found {path.name!r}")

    @property
    def suffix(self) -> str:
        """With its dot, lower case; no two formats share one."""
        return _SUFFIXES[self.name][0]

    @property
    def needs_pixels(self) -> bool:
        """Whether the latent has to be decoded for it."""
        return self.name != "latents"

    @property
    def used_quality(self) -> int:
        """The quality given, or the format's default; 100 where nothing is lost."""
        return self.quality or _DEFAULT_QUALITY.get(self.name, 100)

    def check(self, size: PictureSize) -> None:
        """Check that pictures of this size, or videos, can be kept so.

        Raises:
            InputError: for a JPEG of a video, an MP4 of a picture or of an odd size, and for more
                pixels than the format takes.
            RuntimeUnavailableError: where PyAV is missing.
        """
        if self.name == "jpeg" and size.frames is not None:
            raise InputError("a JPEG holds no video; take mp4, webp or png")
        if self.name == "mp4":
            _check_video(size)
        longest = _LONGEST_SIDE.get(self.name)
        if longest is not None and max(size.height, size.width) > longest:
            raise InputError(
                f"{self.name} holds at most {longest} pixels a side, found {size}; take png"
            )


def default_formats(size: PictureSize) -> tuple[OutputFormat, ...]:
    """PNG for pictures and MP4 for videos, whatever is installed.

    So a run that is resumed elsewhere makes the same files, or is refused by `check_formats`.
    """
    return (OutputFormat("png" if size.frames is None else "mp4"),)


def check_formats(formats: Sequence[OutputFormat], size: PictureSize) -> None:
    """Check formats that a job's files shall have. Raises as `OutputFormat.check` does.

    Raises `InputError` also for none, and for one that is given twice.
    """
    names = [form.name for form in formats]
    if not names or len(set(names)) < len(names):
        raise InputError(f"expected at least one format, each once; found {names or 'none'}")
    for form in formats:
        form.check(size)


def _check_video(size: PictureSize) -> None:
    if size.frames is None:
        raise InputError("an MP4 holds videos, and this bundle makes pictures; take png or jpeg")
    if size.height % 2 or size.width % 2:
        raise InputError(
            f"an MP4 needs even sizes, since its colours are at half the resolution; found {size}. "
            "Take webp or png"
        )
    import_av()
