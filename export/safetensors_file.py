"""Headers of safetensors files: where each tensor's bytes lie.

Format: https://github.com/huggingface/safetensors#format (8 bytes of little-endian header length,
a JSON header, then the data).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from meancache_trt.errors import ExportError

_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

_CODES = {dtype: (code, width) for code, (dtype, width) in _DTYPES.items()}

_LENGTH_BYTES = 8
_LONGEST_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in `file`, from byte `offset` on, `length` bytes, row-major, little-endian."""

    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """All tensors of a file by name, without reading their data.

    Raises `ExportError` where the file is missing, truncated, or not safetensors.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            header, start = _header(stream, file, size)
    except FileNotFoundError:
        raise ExportError(
            f"{file} is missing; the checkpoint's weights must be .safetensors files, as "
            "save_pretrained(safe_serialization=True) writes them; download it again or convert it"
        ) from None
    except OSError as error:
        raise ExportError(f"{file} cannot be read: {error}") from error
    tensors = {
        name: _tensor(file, name, entry, start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_end(file, size, max((t.offset + t.length for t in tensors.values()), default=start))
    return tensors


def _header(stream: BinaryIO, file: Path, size: int) -> tuple[dict[str, Any], int]:
    prefix = stream.read(_LENGTH_BYTES)
    if prefix == b"version ":
        raise ExportError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`")
    if len(prefix) < _LENGTH_BYTES:
        raise ExportError(f"{file} has {size} bytes: it is truncated; download it again")
    (length,) = struct.unpack("<Q", prefix)
    start = _LENGTH_BYTES + length
    if length > _LONGEST_HEADER_BYTES:
        raise ExportError(f"{file} is not a safetensors file; download it again or convert it")
    if start > size:
        raise ExportError(_truncated(file, start, size))
    try:
        header = json.loads(stream.read(length))
    except ValueError as error:
        raise ExportError(f"{file} has a damaged header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise ExportError(f"{file} has a damaged header (not an object); download it again")
    return header, start


def _tensor(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        begin, end = entry["data_offsets"]
        shape = tuple(int(extent) for extent in entry["shape"])
        code = entry["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{file} has a damaged entry for {name}; download it again") from error
    if code not in _DTYPES:
        raise ExportError(
            f"{file} stores {name} as {code}; supported are {', '.join(_DTYPES)}; "
            "use an unquantised checkpoint"
        )
    dtype, width = _DTYPES[code]
    if begin < 0 or end - begin != width * math.prod(shape):
        raise ExportError(f"{file} has a damaged entry for {name}; download it again")
    return StoredTensor(file, start + begin, end - begin, dtype, shape)


def _check_end(file: Path, size: int, end: int) -> None:
    if size < end:
        raise ExportError(_truncated(file, end, size))
    if size > end:
        raise ExportError(
            f"{file} has {size} bytes, but its header describes {end}; download it again"
        )


def _truncated(file: Path, expected: int, found: int) -> str:
    return (
        f"{file} is truncated: expected {expected} bytes by its header, found {found}; "
        "download it again"
    )


def stream_tensors(
    file: Path,
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
    contents: Iterable[NDArray[Any]],
) -> None:
    """Write tensors of these dtypes and shapes, with these contents, in the same order.

    The safetensors library would hold them all in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in kinds.items():
        code, width = _CODES[dtype]
        begin, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # data begins aligned
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for content in contents:
            stream.write(content.data)
