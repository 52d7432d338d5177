"""Tensors in device memory, at fixed addresses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.engine.cuda.device import Device, Memory, Stream
from meancache_trt.engine.cuda.dlpack import capsule_of
from meancache_trt.errors import RenderError

_STORED_AS = {"bfloat16": "uint16"}
"""What the host holds for an element type that NumPy lacks: its bits."""

_LEGACY_STREAM = 1  # what a DLPack consumer that names no CUDA stream works on
_NO_ORDER = -1


class ExternalMemory:
    """A host's own memory; `owner` keeps it alive, if that is not None."""

    def __init__(self, pointer: int, size_bytes: int, owner: object | None) -> None:
        self.pointer, self.size_bytes, self._owner = pointer, size_bytes, owner

    def lend(self) -> None:
        """Do nothing: closing the device leaves it alone."""


class DeviceTensor:
    """Row-major device memory of one shape and element type; holds the memory.

    `dtype` is a NumPy name or "bfloat16", which the host writes and reads as its bits in uint16.
    """

    def __init__(
        self, device: Device, stream: Stream, memory: Memory, shape: tuple[int, ...], dtype: str
    ) -> None:
        self._device, self._stream, self._memory = device, stream, memory
        self._shape, self._dtype = shape, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def pointer(self) -> int:
        """Its address on the device. Raises `RenderError` where its runtime was closed."""
        return self._memory.pointer

    def write(self, value: NDArray[Any]) -> None:
        """Copy `value` in; waits. Raises `RenderError` where shape or dtype differ."""
        if value.shape != self._shape or value.dtype != host_dtype(self._dtype):
            raise RenderError(
                f"expected {self._dtype} of shape {self._shape}, found {value.dtype} of shape "
                f"{value.shape}; prepare a loop for this shape"
            )
        if value.size:
            self._stream.copy_in(self.pointer, np.ascontiguousarray(value))

    def read(self) -> NDArray[Any]:
        value = np.empty(self._shape, host_dtype(self._dtype))
        if value.size:
            self._stream.copy_out(value, self.pointer)
        return value

    def view(self, shape: tuple[int, ...]) -> DeviceTensor:
        if math.prod(shape) != math.prod(self._shape):
            raise RenderError(f"expected as many elements as in {self._shape}, found {shape}")
        return DeviceTensor(self._device, self._stream, self._memory, tuple(shape), self._dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Type and index of the device, by the DLPack protocol."""
        return self._device.dlpack_device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,  # the first one is in all
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """The same memory for another library, in order after our work; see the DLPack protocol.

        `stream` is the consumer's: a `cudaStream_t`, None for the legacy default one, -1 for one
        that needs no order. The memory outlives its runtime where a consumer holds it.
        """
        if copy or dl_device not in (None, self._device.dlpack_device):
            raise BufferError("this tensor is handed over where it lies, without a copy")
        pointer = self.pointer
        if stream != _NO_ORDER:
            self._stream.order_before(_LEGACY_STREAM if stream is None else stream)
        self._memory.lend()
        return capsule_of(
            pointer,
            self._shape,
            self._dtype,
            device=self._device.dlpack_device,
            owner=self._memory,
        )


def host_dtype(dtype: str) -> np.dtype[Any]:
    """What the host holds a tensor's elements in."""
    return np.dtype(_STORED_AS.get(dtype, dtype))


def size_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * host_dtype(dtype).itemsize
