"""What a file says of its making: names and texts, kept where each format has room for them.

PNG has a text chunk for each. The others keep them as one JSON text in ASCII, which no reader can
take for another encoding and which is the same at every writing: JPEG and WebP as the EXIF
UserComment, MP4 as the tag `comment`, safetensors as the metadata entry `comment` (it keeps
several entries in an order of chance).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from meancache_trt.errors import InputError
from meancache_trt.media.formats import OutputFormat
from meancache_trt.media.video import import_av

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

COMMENT = "comment"
_EXIF_IFD, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
_LONGEST_EXIF = 65533
"""A JPEG segment holds 65535 bytes, with the two of its length."""

_UNICODE = ("prompt", "negative_prompt")
"""Text chunks of UTF-8; the others are Latin-1 where that holds them."""


def to_comment(metadata: Mapping[str, str]) -> str:
    """The JSON text, in ASCII."""
    return json.dumps(dict(metadata), ensure_ascii=True)


def to_png(metadata: Mapping[str, str]) -> PngInfo:
    """PNG text chunks in the order given."""
    from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415  (only pictures need it)

    info = PngInfo()
    for key, value in metadata.items():
        add = info.add_itxt if key in _UNICODE else info.add_text
        add(key, value)
    return info


def to_exif(metadata: Mapping[str, str]) -> bytes:
    """An EXIF block. Raises `InputError` where the texts are longer than a JPEG takes."""
    from PIL.Image import Exif  # noqa: PLC0415

    exif = Exif()
    exif[_EXIF_IFD] = {_USER_COMMENT: _ASCII + to_comment(metadata).encode()}
    block = exif.tobytes()
    if len(block) > _LONGEST_EXIF:
        raise InputError(
            f"EXIF holds {_LONGEST_EXIF} bytes, found {len(block)} of prompts and settings; "
            "shorten the prompt or take png"
        )
    return block


def read_metadata(path: Path) -> dict[str, str]:
    """What a file of any format says of its making; empty where no `Rendering` was saved there.

    Raises `InputError` where the file is missing or damaged, or its suffix means no format, and
    `RuntimeUnavailableError` for an MP4 without PyAV.
    """
    read = {"png": _read_png, "mp4": _read_mp4, "latents": _read_latents}
    try:
        return read.get(OutputFormat.of_suffix(path).name, _read_exif)(path)
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError is Pillow's for broken PNGs
        raise InputError(
            f"cannot read the metadata of {path} ({error}); it is missing, damaged or not of the "
            "format that its suffix says"
        ) from error


def _read_png(path: Path) -> dict[str, str]:
    from PIL import Image  # noqa: PLC0415

    with Image.open(path, formats=["PNG"]) as picture:
        return {
            key: str(value)
            for key, value in picture.info.items()
            if isinstance(key, str) and isinstance(value, str)
        }


def _read_exif(path: Path) -> dict[str, str]:
    from PIL import Image  # noqa: PLC0415

    with Image.open(path, formats=["JPEG", "WEBP"]) as picture:
        comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    return _from_comment(comment.removeprefix(_ASCII) if isinstance(comment, bytes) else "")


def _read_mp4(path: Path) -> dict[str, str]:
    av = import_av()
    try:
        with av.open(str(path), format="mp4") as container:
            return _from_comment(container.metadata.get(COMMENT, ""))
    except av.FFmpegError as error:
        raise ValueError(str(error)) from error


def _read_latents(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    try:
        with safe_open(path, "numpy") as file:
            return _from_comment((file.metadata() or {}).get(COMMENT, ""))
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _from_comment(text: str | bytes) -> dict[str, str]:
    try:
        return msgspec.json.decode(text, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError):  # somebody else's comment, or none
        return {}
