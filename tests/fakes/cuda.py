"""CUDA without a GPU: device memory, streams, captures and graphs over NumPy memory, strictly.

It implements `meancache_trt.engine.cuda.device.Device`. Nothing runs before somebody waits, so that
a missing wait shows; new memory is full of NaN, so that what is never written shows; and whatever
CUDA forbids raises `RuleBroken`. What is wrong in a finalizer is kept in `violations`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.engine.cuda.device import ALIGNMENT_BYTES
from meancache_trt.engine.cuda.driver import stream_handle
from meancache_trt.errors import RenderError

_GARBAGE = 0xFF  # NaN in every float type, -1 in integers
_FIRST_HANDLE = 0x1000
_HANDLE_STEP = 0x100


class RuleBroken(AssertionError):  # noqa: N818  (as it reads)
    """What CUDA or TensorRT forbid, or leave undefined."""


@dataclass
class Block:
    """An allocation; `array` is as long as it is."""

    pointer: int
    array: NDArray[np.uint8]
    is_alive: bool = True


@dataclass
class Operation:
    """Work on a stream: `run` does it, `blocks` are the activation blocks that it uses."""

    run: Callable[[], None]
    blocks: tuple[Block, ...] = ()


class FakeMemory:
    def __init__(self, device: FakeDevice, block: Block) -> None:
        self._block, self.size_bytes = block, len(block.array)
        self.is_lent = False
        self._free = weakref.finalize(self, device.discard, lambda: device.release(block))
        self._free.atexit = False

    @property
    def pointer(self) -> int:
        if not self._block.is_alive:
            raise RenderError("this memory was freed when its runtime was closed; open it again")
        return self._block.pointer

    def lend(self) -> None:
        self.is_lent = True


@dataclass
class FakeEvent:
    stream: FakeStream
    position: int


class FakeGraph:
    def __init__(self, stream: FakeStream, operations: list[Operation]) -> None:
        self._stream, self._operations, self._is_closed = stream, operations, False
        device = stream.device
        device.graphs.add(self)

    def launch(self) -> None:
        if self._is_closed:
            raise RuleBroken("a closed graph was launched")
        self._stream.device.launches += 1
        self._stream.device.forbid("launching a graph")
        for operation in self._operations:
            self._stream.enqueue(operation)

    def close(self) -> None:
        if self._is_closed:
            raise RuleBroken("a graph was closed twice")
        self._is_closed = True
        self._stream.device.order.append("graph")


class FakeStream:
    def __init__(self, device: FakeDevice, handle: int, *, is_ours: bool) -> None:
        self.device, self._handle, self._is_ours = device, handle, is_ours
        self.pending: list[Operation] = []
        self.done = 0
        self.captured: list[Operation] | None = None
        self.is_closed = False

    @property
    def handle(self) -> int:
        if self.is_closed:
            raise RenderError("the runtime was closed; open it again")
        return self._handle

    def enqueue(self, operation: Operation) -> None:
        _ = self.handle
        queue = self.pending if self.captured is None else self.captured
        queue.append(operation)

    def run_until(self, position: int) -> None:
        with self.device.running:  # threads may wait for one stream at once
            while self.done < position:
                operation = self.pending.pop(0)
                self.done += 1
                operation.run()

    def copy_in(self, pointer: int, source: NDArray[Any]) -> None:
        assert source.flags.c_contiguous
        self.synchronize()
        self.device.bytes_at(pointer, source.nbytes)[:] = source.reshape(-1).view(np.uint8)

    def copy_out(self, target: NDArray[Any], pointer: int) -> None:
        assert target.flags.c_contiguous
        self.synchronize()
        target.reshape(-1).view(np.uint8)[:] = self.device.bytes_at(pointer, target.nbytes)

    def fill_zeros(self, pointer: int, size_bytes: int) -> None:
        self.device.bytes_at(pointer, size_bytes)
        self.enqueue(Operation(lambda: self.device.bytes_at(pointer, size_bytes).fill(0)))

    def record(self) -> FakeEvent:
        self.device.forbid("recording an event")
        return FakeEvent(self, self.done + len(self.pending))

    def wait_for(self, event: FakeEvent) -> None:
        self.device.forbid("waiting for an event")
        self.enqueue(Operation(lambda: event.stream.run_until(event.position)))

    def order_before(self, handle: int) -> None:
        """A consumer of host memory has no stream: it reads at once, so all is done here."""
        self.device.ordered_before.append(handle)
        self.run_until(self.record().position)

    def capture(self, enqueue: Callable[[], None]) -> FakeGraph:
        self.device.forbid("capturing")
        self.captured = []
        try:
            enqueue()
            return FakeGraph(self, self.captured)
        finally:
            self.captured = None

    def synchronize(self) -> None:
        _ = self.handle
        self.device.forbid("waiting for a stream")
        self.device.waits += 1
        self.run_until(self.done + len(self.pending))

    def close(self) -> None:
        if self.is_closed:
            return
        self.synchronize()
        if self._is_ours:  # a host's own goes on
            self.is_closed = True
            del self.device.streams[self._handle]
            self.device.order.append("stream")


@dataclass
class FakeDevice:
    """One GPU; `compute_capability` and `free` memory are what a test says.

    Attributes:
        launches: of graphs.
        waits: of the host.
        order: what was freed, in order.
        violations: what was freed wrongly; a test asserts that it is empty.
        enqueued: names of engines that were enqueued one by one.
    """

    compute_capability: str = "8.9"
    product: str = "Fake GPU"
    free: int = 1 << 30
    name: str = "cpu"
    dlpack_device: tuple[int, int] = (1, 0)
    launches: int = 0
    waits: int = 0
    enqueued: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    ordered_before: list[int] = field(default_factory=list)
    streams: dict[int, FakeStream] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    graphs: weakref.WeakSet[FakeGraph] = field(default_factory=weakref.WeakSet)
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.running = threading.RLock()
        self._discarded: list[Callable[[], None]] = []
        self._memories: weakref.WeakSet[FakeMemory] = weakref.WeakSet()
        self._next_handle = _FIRST_HANDLE

    @property
    def is_capturing(self) -> bool:
        return any(stream.captured is not None for stream in self.streams.values())

    def forbid(self, action: str) -> None:
        """Raise where a capture is under way."""
        if self.is_capturing:
            raise RuleBroken(f"{action} while a capture is under way")

    def bytes_at(self, pointer: int, size_bytes: int) -> NDArray[np.uint8]:
        """Device memory; raises where any of it is in no live allocation."""
        block = self.block_at(pointer, size_bytes)
        start = pointer - block.pointer
        return block.array[start : start + size_bytes]

    def block_at(self, pointer: int, size_bytes: int) -> Block:
        for block in self.blocks:
            start = pointer - block.pointer
            if block.is_alive and start >= 0 and start + size_bytes <= len(block.array):
                return block
        raise RuleBroken(f"{size_bytes} bytes at {pointer:#x} are in no live allocation")

    def adopt(self, array: NDArray[Any]) -> int:
        """Count a host's array as device memory; returns its address."""
        pointer = int(array.ctypes.data)
        self.blocks.append(Block(pointer, array.reshape(-1).view(np.uint8)))
        return pointer

    def adopt_stream(self) -> FakeStream:
        """A stream that a host made."""
        self._next_handle += _HANDLE_STEP
        stream = FakeStream(self, self._next_handle, is_ours=False)
        self.streams[self._next_handle] = stream
        return stream

    def activate(self) -> None:
        if self.is_closed:
            raise RuleBroken("a closed device is used")

    def free_bytes(self) -> int:
        return self.free

    def allocate(self, size_bytes: int) -> FakeMemory:
        self.activate()
        self.forbid("allocating")
        self.collect()
        size = max(size_bytes, 1)
        if size > self.free:
            raise RenderError(f"expected {size} bytes, found {self.free}")
        whole = np.full(size + ALIGNMENT_BYTES, _GARBAGE, np.uint8)
        start = -int(whole.ctypes.data) % ALIGNMENT_BYTES
        block = Block(int(whole.ctypes.data) + start, whole[start : start + size])
        self.blocks.append(block)
        memory = FakeMemory(self, block)
        self._memories.add(memory)
        return memory

    def release(self, block: Block) -> None:
        """Free memory, whose bytes another owner may have from now on."""
        if self.is_capturing:
            self.violations.append("memory was freed while a capture was under way")
        block.is_alive = False
        block.array.fill(_GARBAGE)

    def stream(self, external: object | None = None) -> FakeStream:
        self.activate()
        if external is not None:
            return self.streams[stream_handle(external)]
        self._next_handle += _HANDLE_STEP
        made = FakeStream(self, self._next_handle, is_ours=True)
        self.streams[self._next_handle] = made
        return made

    def discard(self, free: Callable[[], None]) -> None:
        self._discarded.append(free)
        if self.is_closed:
            self.collect()

    def collect(self) -> None:
        if not self._discarded or self.is_capturing:
            return
        for stream in self.streams.values():
            stream.run_until(stream.done + len(stream.pending))
        while self._discarded:
            self._discarded.pop(0)()

    def close(self) -> None:
        if self.is_closed:
            return
        self.collect()
        for memory in list(self._memories):
            if not memory.is_lent:
                memory._free.detach()
                self.release(memory._block)
        self.is_closed = True
        self.order.append("device")
