"""What every runtime on a GPU shares: a device, a stream, tensors, and an orderly end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from meancache_trt.engine.cuda.device import Device, Stream
from meancache_trt.engine.cuda.dlpack import described
from meancache_trt.engine.cuda.tensors import DeviceTensor, ExternalMemory, size_bytes
from meancache_trt.errors import InputError, RenderError

_CPU = 1  # kDLCPU, which has no streams


class DeviceRuntime:
    """Tensors on one device, with all work in order on one stream.

    Args:
        device: closed with the runtime, unless it is shared.
        stream: a host's own to work on, as `Device.stream` takes it; by default a new one.

    Raises `RenderError` in every method once it is closed.
    """

    def __init__(self, device: Device, stream: object | None = None) -> None:
        self.cuda = device
        self.stream: Stream = device.stream(stream)
        self._turn: AbstractContextManager[object] = threading.RLock()
        self._is_closed = False
        self._notes: list[str] = []

    @property
    def device(self) -> str:
        """Such as "cuda:0"."""
        return self.cuda.name

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done otherwise than a user might expect, and why, once each."""
        return tuple(self._notes)

    def note(self, text: str) -> None:
        """Add to `notes`."""
        if text not in self._notes:
            self._notes.append(text)

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceTensor:
        tensor = self._empty(tuple(shape), dtype)
        self.stream.fill_zeros(tensor.pointer, max(size_bytes(tensor.shape, dtype), 1))
        return tensor

    def tensor(self, value: NDArray[Any]) -> DeviceTensor:
        tensor = self._empty(value.shape, str(value.dtype))
        tensor.write(np.ascontiguousarray(value).reshape(value.shape))
        return tensor

    def from_dlpack(self, value: Any) -> DeviceTensor:
        """See `Runtime.from_dlpack`; element types are those of NumPy, and bfloat16."""
        self.check_open()
        device = self.cuda.dlpack_device
        stream = None if device[0] == _CPU else self.stream.handle
        found = described(value, device, stream)
        memory = ExternalMemory(found.pointer, size_bytes(found.shape, found.dtype), found.owner)
        return DeviceTensor(self.cuda, self.stream, memory, found.shape, found.dtype)

    def from_pointer(
        self, pointer: int, shape: Sequence[int], dtype: str, *, owner: object | None = None
    ) -> DeviceTensor:
        """A tensor over a host's device memory, row-major; copies nothing.

        `owner` is kept alive with the tensor. What the host enqueued before on another stream is
        its own to wait for. Raises `InputError` for no address.
        """
        self.check_open()
        if pointer <= 0:
            raise InputError(f"expected the address of device memory, found {pointer}")
        memory = ExternalMemory(pointer, size_bytes(tuple(shape), dtype), owner)
        return DeviceTensor(self.cuda, self.stream, memory, tuple(shape), dtype)

    def wait_for(self, other: DeviceRuntime) -> None:
        """Let what is enqueued here from now on wait for what the other has enqueued so far.

        Both are on one device; the host does not wait.
        """
        self.check_open()
        self.stream.wait_for(other.stream.record())

    def synchronize(self) -> None:
        """Wait until everything enqueued here is done."""
        self.check_open()
        self.stream.synchronize()

    def turn(self) -> AbstractContextManager[object]:
        """See `Runtime.turn`: one thread at a time talks to the device."""
        return self._turn

    def free_bytes(self) -> int:
        """Memory of the device that is free."""
        return self.cuda.free_bytes()

    def check_open(self) -> None:
        """Raise `RenderError` where the runtime was closed."""
        if self._is_closed:
            raise RenderError("the runtime was closed; open it again")

    def close(self) -> None:
        """Wait, then free graphs, tensors, stream and device; may be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self.stream.synchronize()
        finally:
            try:
                self._free()
            finally:
                self.stream.close()
                self._close_device()

    def __enter__(self) -> Self:
        self.check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _free(self) -> None:
        """What a backend holds, once no work is under way."""

    def _close_device(self) -> None:
        self.cuda.close()

    def _empty(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        self.check_open()
        memory = self.cuda.allocate(size_bytes(shape, dtype))
        return DeviceTensor(self.cuda, self.stream, memory, shape, dtype)
