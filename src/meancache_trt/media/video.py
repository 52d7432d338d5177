"""Videos as MP4, by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import RuntimeUnavailableError

_BT709, _SRGB, _LIMITED = 1, 13, 1
"""Matrix and primaries, transfer and range as H.273 numbers them. Written out, since players guess
by a video's height what the file does not say."""


def import_av() -> ModuleType:
    """PyAV. Raises `RuntimeUnavailableError` where it is missing."""
    try:
        import av  # noqa: PLC0415
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"MP4 needs PyAV ({error}); install meancache-trt[batch], or take webp or png, which "
            "animate a video without it"
        ) from error
    return av  # type: ignore[no-any-return]


def encode_mp4(
    frames: Sequence[NDArray[np.uint8]], frames_per_second: float, quality: int, comment: str
) -> bytes:
    """Frames (H, W, 3) of sRGB as H.264 in an MP4; the same frames always give the same bytes.

    `quality` from 1 to 100 becomes a CRF from 50 to 1. Raises `RuntimeUnavailableError` where PyAV
    is missing.
    """
    av = import_av()
    height, width, _ = frames[0].shape
    file = BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        container.metadata["comment"] = comment
        rate = Fraction(frames_per_second).limit_denominator(1001)  # 24000/1001 stays exact
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(_crf(quality))})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # x264's bytes depend on the number of its threads
        context.colorspace = context.color_primaries = _BT709
        context.color_trc, context.color_range = _SRGB, _LIMITED
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            converted = picture.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            container.mux(stream.encode(converted))
        container.mux(stream.encode())
    return file.getvalue()


def _crf(quality: int) -> int:
    return 1 + (100 - quality) // 2  # not 0, whose profile few players take
