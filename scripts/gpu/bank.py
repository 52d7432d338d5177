"""Weights that overlap: a checkpoint of any size whose values take a few hundred megabytes of disk.

Each tensor of a safetensors file begins 64 bytes after the one before, over random values that are
as long as the longest. No two tensors are equal, none is zero (zeros draw less power, and a GPU
then clocks higher), and to everyone who reads them they are tensors of their own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from meancache_trt.export.safetensors_file import StoredTensor, read_tensors

_STEP_BYTES = 64  # more than any library aligns elements to
_BYTES = 2  # bfloat16
_DEVIATION = 0.02  # as networks are initialised
_ONE = 0x3F80  # 1.0 in bfloat16
_CHUNK = 1 << 22


def share_values(folder: Path) -> None:
    """Give every bfloat16 safetensors file of a folder such values, in place of what it holds."""
    for file in sorted(folder.glob("*.safetensors")):
        _rewrite(file, read_tensors(file))


def _rewrite(file: Path, tensors: dict[str, StoredTensor]) -> None:
    scales = [name for name, tensor in tensors.items() if _is_scale(name, tensor)]
    ones = _region(tensors[name] for name in scales)
    header: dict[str, Any] = {}
    next_scale, next_value = 0, ones
    for name, tensor in tensors.items():
        begin = next_scale if name in scales else next_value
        if name in scales:
            next_scale += _STEP_BYTES
        else:
            next_value += _STEP_BYTES
        offsets = [begin, begin + tensor.length]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
    end = max(entry["data_offsets"][1] for entry in header.values())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = file.with_suffix(".shared")
    with temporary.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        ones = min(ones, end)
        stream.write(np.full(ones // _BYTES, _ONE, np.uint16).tobytes())
        _write_values(stream, (end - ones) // _BYTES)
    temporary.replace(file)


def _is_scale(name: str, tensor: StoredTensor) -> bool:
    """Whether it is the weight of a normalisation, which is 1 before training."""
    return len(tensor.shape) == 1 and name.endswith("weight")


def _region(tensors: Iterable[StoredTensor]) -> int:
    lengths = [tensor.length for tensor in tensors]
    return max(lengths, default=0) + _STEP_BYTES * len(lengths)


def _write_values(stream: BinaryIO, count: int) -> None:
    generator = np.random.default_rng(0)
    while count:
        values = generator.standard_normal(min(count, _CHUNK), np.float32) * np.float32(_DEVIATION)
        # The upper halves: rounding towards zero will do for random values.
        stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        count -= len(values)
