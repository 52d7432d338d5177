"""What the runtimes need of CUDA, as a protocol: memory, streams, captured work, events.

The implementation on NVIDIA's driver is `meancache_trt.engine.cuda.driver`; everything above this
protocol can be tested without a GPU. Every method raises `RenderError` where CUDA reports an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

ALIGNMENT_BYTES = 256
"""What TensorRT asks of the address of every input, output and activation block (NvInferRuntime.h,
`setTensorAddress`); CUDA's own allocations have it."""


def aligned(size_bytes: int) -> int:
    """The next multiple of the alignment, at least one, so that no two allocations share it."""
    return -(-max(size_bytes, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Memory(Protocol):
    """Device memory, freed after its object is gone and the device has done what was enqueued."""

    @property
    def pointer(self) -> int:
        """Its address, a multiple of `ALIGNMENT_BYTES`."""

    @property
    def size_bytes(self) -> int: ...

    def lend(self) -> None:
        """Keep it past the device's closing, for as long as its object lives."""


class Event(Protocol):
    """A place in a stream's work."""


class CapturedGraph(Protocol):
    """A CUDA graph, made of what a stream captured. Addresses in it are those of the capture."""

    def launch(self) -> None:
        """Enqueue all of it on the stream that captured it."""

    def close(self) -> None:
        """Free it; it may still be running."""


class Stream(Protocol):
    """A queue of work on the device, run in order. Never the default one."""

    @property
    def handle(self) -> int:
        """Its `cudaStream_t` as a number."""

    def copy_in(self, pointer: int, source: NDArray[Any]) -> None:
        """Copy a C-contiguous array to the device; waits, so that the array may be dropped."""

    def copy_out(self, target: NDArray[Any], pointer: int) -> None:
        """Fill a C-contiguous array from the device; waits."""

    def fill_zeros(self, pointer: int, size_bytes: int) -> None:
        """Set bytes to zero; does not wait."""

    def record(self) -> Event:
        """Mark what has been enqueued so far."""

    def wait_for(self, event: Event) -> None:
        """Let work that is enqueued from here on wait for an event; the host does not wait."""

    def order_before(self, handle: int) -> None:
        """Let the stream with that `cudaStream_t` wait for what has been enqueued here."""

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph:
        """Record what `enqueue` enqueues on this stream, instead of running it.

        What `enqueue` raises is raised again, and the stream can be used as before.
        """

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""

    def close(self) -> None:
        """Wait, then free the stream where it is not an external one."""


class Device(Protocol):
    """One GPU. Not thread-safe, but may be used from one thread after another."""

    @property
    def name(self) -> str:
        """As torch names it, such as "cuda:0"."""

    @property
    def product(self) -> str:
        """Such as "NVIDIA GeForce RTX 4090"."""

    @property
    def compute_capability(self) -> str:
        """Such as "8.9"."""

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """Type and index, as the DLPack protocol has them; CUDA is type 2."""

    def activate(self) -> None:
        """Make the GPU the calling thread's own, for libraries that take it from there."""

    def free_bytes(self) -> int:
        """Device memory that is free."""

    def allocate(self, size_bytes: int) -> Memory:
        """Aligned memory with arbitrary contents. Raises `RenderError` where there is too little.

        May wait for the device.
        """

    def stream(self, external: object | None = None) -> Stream:
        """A new stream, or one over a host's own: a `cudaStream_t` or a `__cuda_stream__` object.

        An external one stays the host's. Raises `InputError` for a default stream and for what is
        no stream.
        """

    def discard(self, free: Callable[[], None]) -> None:
        """Call `free` later, when the device has done what was enqueued, and before it is closed.

        For finalizers, which may run while a capture is under way, where freeing is forbidden.
        """

    def collect(self) -> None:
        """Free what was discarded; waits for the device where there is something."""

    def close(self) -> None:
        """Wait, free all memory that is not lent, and let go of the GPU; may be called twice."""
