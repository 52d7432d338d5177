"""Frames and latents as the bytes of a file; the same input always gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from meancache_trt.media.formats import OutputFormat
from meancache_trt.media.metadata import COMMENT, to_comment, to_exif, to_png
from meancache_trt.media.video import encode_mp4

if TYPE_CHECKING:
    from PIL.Image import Image

LATENT = "latent"
"""The one tensor of a latents file."""


def encode_latent(latent: NDArray[np.float32], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of one float32 tensor, of the shape given."""
    from safetensors.numpy import save  # noqa: PLC0415  (only latents need it)

    tensors = {LATENT: np.ascontiguousarray(latent, np.float32)}
    return bytes(save(tensors, {COMMENT: to_comment(metadata)}))


def encode_frames(
    form: OutputFormat,
    frames: Sequence[NDArray[np.uint8]],
    frames_per_second: float | None,
    metadata: Mapping[str, str],
) -> bytes:
    """A picture, or a video's frames in order, each (H, W, 3) 8-bit RGB.

    `form` was checked to take them and needs pixels. Raises `InputError` where a JPEG or WebP has
    no room for the metadata, `RuntimeUnavailableError` for an MP4 without PyAV.
    """
    rate = frames_per_second or 1.0
    if form.name == "mp4":
        return encode_mp4(frames, rate, form.used_quality, to_comment(metadata))
    from PIL.Image import fromarray  # noqa: PLC0415  (only pictures need it)

    pictures = [fromarray(frame) for frame in frames]
    file = BytesIO()
    if form.name == "png":
        _save_png(pictures, file, rate, metadata)
    elif form.name == "webp":
        _save_webp(pictures, file, rate, metadata, form.used_quality)
    else:
        pictures[0].save(file, "JPEG", quality=form.used_quality, exif=to_exif(metadata))
    return file.getvalue()


def _save_png(
    pictures: list[Image], file: BytesIO, rate: float, metadata: Mapping[str, str]
) -> None:
    first, *others = pictures
    first.save(
        file,
        "PNG",
        pnginfo=to_png(metadata),
        save_all=bool(others),
        append_images=others,
        duration=1000 / rate,
    )


def _save_webp(
    pictures: list[Image], file: BytesIO, rate: float, metadata: Mapping[str, str], quality: int
) -> None:
    first, *others = pictures
    first.save(
        file,
        "WEBP",
        quality=quality,
        lossless=quality == 100,
        exif=to_exif(metadata),
        save_all=bool(others),
        append_images=others,
        duration=_durations_ms(len(pictures), rate),
    )


def _durations_ms(frames: int, rate: float) -> list[int]:
    """Whole milliseconds, which is what WebP has, whose sum does not drift from the rate."""
    ends = [round(1000 * frame / rate) for frame in range(frames + 1)]
    return [end - start for start, end in pairwise(ends)]
