from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from meancache_trt.errors import ExportError
from meancache_trt.export.safetensors_file import read_tensors


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def test_tensors_are_where_the_header_says(weights: Path) -> None:
    tensors = read_tensors(weights)

    assert set(tensors) == {"a", "b"}
    a = tensors["a"]
    assert (a.dtype, a.shape, a.length, a.file) == ("float32", (2, 3), 24, weights)
    values = np.frombuffer(weights.read_bytes()[a.offset :][: a.length], np.float32)
    assert values.tolist() == [0, 1, 2, 3, 4, 5]
    assert (tensors["b"].dtype, tensors["b"].shape) == ("float16", (4,))


@pytest.mark.parametrize("cut", [1, 20])
def test_truncated_data_is_told_with_both_sizes(weights: Path, cut: int) -> None:
    content = weights.read_bytes()
    weights.write_bytes(content[:-cut])
    message = f"truncated: expected {len(content)} bytes.*found {len(content) - cut}"
    with pytest.raises(ExportError, match=message):
        read_tensors(weights)


def test_truncated_header_is_told_with_both_sizes(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ExportError, match=r"truncated: expected .* found 40"):
        read_tensors(weights)


@pytest.mark.parametrize("size", [0, 5])
def test_file_shorter_than_its_length_field_is_truncated(weights: Path, size: int) -> None:
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ExportError, match=f"has {size} bytes: it is truncated"):
        read_tensors(weights)


def test_bytes_after_the_last_tensor_are_refused(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b"rest")
    with pytest.raises(ExportError, match="its header describes"):
        read_tensors(weights)


def test_missing_file_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is missing.*safe_serialization=True"):
        read_tensors(tmp_path / "none.safetensors")


def test_directory_in_place_of_a_file_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read"):
        read_tensors(tmp_path)


def test_git_lfs_pointer_is_recognised(weights: Path) -> None:
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(ExportError, match="git lfs pull"):
        read_tensors(weights)


def test_another_format_is_recognised(weights: Path) -> None:
    weights.write_bytes(b"\x80\x02}q\x00(X\x04\x00" * 4)
    with pytest.raises(ExportError, match="not a safetensors file"):
        read_tensors(weights)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xff"])
def test_damaged_header_is_refused(weights: Path, content: bytes) -> None:
    weights.write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(ExportError, match="damaged header"):
        read_tensors(weights)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        3,
    ],
)
def test_damaged_entry_is_named(weights: Path, entry: Any) -> None:
    write(weights, {"block.weight": entry}, b"1234")
    with pytest.raises(ExportError, match=r"damaged entry for block\.weight"):
        read_tensors(weights)


def test_quantised_dtype_is_refused_by_name(weights: Path) -> None:
    entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
    write(weights, {"block.weight": entry}, b"1234")
    with pytest.raises(ExportError, match=r"F8_E4M3.*unquantised"):
        read_tensors(weights)
