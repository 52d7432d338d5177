"""The CUDA device on NVIDIA's driver, by the package cuda-bindings (cuda-python).

The driver's interface and not cuda.core's: a cuda.core buffer is freed on its stream whenever its
object goes, which a capture under way on that stream would record, and cuda.core waits for ever
where there is no driver. Here freeing is put off until no work is under way. Open a device after
`meancache_trt.engine.probe.find_gpu` has found it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from meancache_trt.engine.cuda.device import ALIGNMENT_BYTES, CapturedGraph, Device, Event
from meancache_trt.engine.probe import Gpu
from meancache_trt.errors import InputError, RenderError, RuntimeUnavailableError

_CUDA = 2  # kDLCUDA of the DLPack protocol
_DEFAULT_STREAMS = (0, 1, 2)  # null, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD


class DriverDevice:
    """A GPU by its primary context, which torch, ONNX Runtime and TensorRT use too.

    `driver` is the module `cuda.bindings.driver`.
    """

    def __init__(self, gpu: Gpu, driver: Any) -> None:
        self.cuda = driver
        self.name = f"cuda:{gpu.index}"
        self.product = gpu.name
        self.compute_capability = gpu.compute_capability
        self.dlpack_device = (_CUDA, gpu.index)
        self.check("start", driver.cuInit(0))
        self._ordinal = self.check("find the GPU", driver.cuDeviceGet(gpu.index))
        retained = driver.cuDevicePrimaryCtxRetain(self._ordinal)
        self._context = self.check("open the GPU", retained)
        self._memories: weakref.WeakSet[DriverMemory] = weakref.WeakSet()
        self._pointers: set[int] = set()
        self._discarded: list[Callable[[], None]] = []
        self._captures = 0
        self._is_closed = False
        self.activate()

    def check(self, action: str, result: tuple[Any, ...]) -> Any:
        """What a call of the driver returned. Raises `RenderError` for any status but success."""
        status, *values = result
        if status != self.cuda.CUresult.CUDA_SUCCESS:
            _, name = self.cuda.cuGetErrorName(status)
            _, words = self.cuda.cuGetErrorString(status)
            raise RenderError(
                f"CUDA could not {action}: {_text(name)} ({_text(words)}); after an error of a "
                "kernel this process cannot use the GPU any more: start it again"
            )
        return values[0] if values else None

    def activate(self) -> None:
        self.check("select the GPU", self.cuda.cuCtxSetCurrent(self._context))

    def free_bytes(self) -> int:
        self.activate()
        status, free, _ = self.cuda.cuMemGetInfo()
        self.check("ask for free memory", (status,))
        return int(free)

    def allocate(self, size_bytes: int) -> DriverMemory:
        self._check_open()
        self.activate()
        self.collect()
        size = max(size_bytes, 1)
        result = self.cuda.cuMemAlloc(size)
        if result[0] == self.cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise RenderError(
                f"expected {size / 2**20:.0f} MiB of memory on the GPU, found "
                f"{self.free_bytes() / 2**20:.0f} MiB free; close other programs, render smaller "
                "pictures, or plan with --weight-streaming"
            )
        pointer = int(self.check("allocate memory", result))
        assert pointer % ALIGNMENT_BYTES == 0  # CUDA C++ Programming Guide, device memory accesses
        self._pointers.add(pointer)
        memory = DriverMemory(self, pointer, size)
        self._memories.add(memory)
        return memory

    def free(self, pointer: int) -> None:
        """Free what `allocate` gave; nothing may be using it."""
        self._pointers.discard(pointer)
        self.activate()
        self.check("free memory", self.cuda.cuMemFree(pointer))
        self._let_go()

    def stream(self, external: object | None = None) -> DriverStream:
        self._check_open()
        self.activate()
        if external is not None:
            return DriverStream(self, stream_handle(external), is_ours=False)
        flags = int(self.cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        created = self.check("make a stream", self.cuda.cuStreamCreate(flags))
        return DriverStream(self, int(created), is_ours=True)

    def discard(self, free: Callable[[], None]) -> None:
        self._discarded.append(free)
        if self._is_closed:
            self.collect()

    def collect(self) -> None:
        if not self._discarded or self._captures:
            return
        self.synchronize()
        while self._discarded:
            self._discarded.pop(0)()

    def synchronize(self) -> None:
        """Wait for all work on the GPU."""
        self.activate()
        self.check("finish its work", self.cuda.cuCtxSynchronize())

    def begin_capture(self) -> None:
        """Put off all freeing until `end_capture`."""
        self._captures += 1

    def end_capture(self) -> None:
        """See `begin_capture`."""
        self._captures -= 1

    def close(self) -> None:
        if self._is_closed:
            return
        try:
            self.collect()
            self.synchronize()
            for memory in list(self._memories):
                memory.close()
        finally:
            self._is_closed = True
            self._let_go()

    def _let_go(self) -> None:
        """Release the GPU once it is closed and no memory is lent."""
        if self._is_closed and not self._pointers and self._context is not None:
            self._context = None
            self.cuda.cuDevicePrimaryCtxRelease(self._ordinal)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RenderError("the GPU was closed; open the pipeline again")


class DriverMemory:
    """Memory by cuMemAlloc."""

    def __init__(self, device: DriverDevice, pointer: int, size_bytes: int) -> None:
        self._pointer, self.size_bytes = pointer, size_bytes
        self._is_lent = False
        self._free = weakref.finalize(self, device.discard, lambda: device.free(pointer))
        self._free.atexit = False  # the process's end frees it
        self._device = device

    @property
    def pointer(self) -> int:
        if not self._free.alive:
            raise RenderError("this memory was freed when its runtime was closed; open it again")
        return self._pointer

    def lend(self) -> None:
        self._is_lent = True

    def close(self) -> None:
        """Free it now, where it is not lent; nothing may be using it."""
        if not self._is_lent and self._free.detach():
            self._device.free(self._pointer)


class DriverEvent:
    """An event without timing."""

    def __init__(self, device: DriverDevice) -> None:
        flags = int(device.cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self.native = device.check("make an event", device.cuda.cuEventCreate(flags))
        # The driver keeps it until it is reached.
        weakref.finalize(self, device.cuda.cuEventDestroy, self.native).atexit = False


class DriverGraph:
    """An executable graph on the stream that captured it."""

    def __init__(self, device: DriverDevice, stream: DriverStream, native: Any) -> None:
        self._device, self._stream, self._native = device, stream, native
        destroy = device.cuda.cuGraphExecDestroy
        self._free = weakref.finalize(self, device.discard, lambda: destroy(native))
        self._free.atexit = False

    def launch(self) -> None:
        if not self._free.alive:
            raise RenderError(
                "this CUDA graph was freed when its runtime was closed; open it again"
            )
        self._device.activate()
        stream = self._stream.native
        launched = self._device.cuda.cuGraphLaunch(self._native, stream)
        self._device.check("launch a CUDA graph", launched)

    def close(self) -> None:
        if self._free.detach():
            self._device.activate()
            destroyed = self._device.cuda.cuGraphExecDestroy(self._native)
            self._device.check("free a CUDA graph", destroyed)


class DriverStream:
    """A stream by its handle."""

    def __init__(self, device: DriverDevice, handle: int, *, is_ours: bool) -> None:
        self._device, self._handle, self._is_ours = device, handle, is_ours
        self._is_closed = False

    @property
    def handle(self) -> int:
        self._check_open()
        return self._handle

    @property
    def native(self) -> Any:
        """The handle as the driver's own type."""
        return self._device.cuda.CUstream(self.handle)

    def copy_in(self, pointer: int, source: NDArray[Any]) -> None:
        self._do(
            "copy to the GPU",
            lambda cuda, stream: cuda.cuMemcpyHtoDAsync(
                pointer, source.ctypes.data, source.nbytes, stream
            ),
        )
        self.synchronize()

    def copy_out(self, target: NDArray[Any], pointer: int) -> None:
        self._do(
            "copy from the GPU",
            lambda cuda, stream: cuda.cuMemcpyDtoHAsync(
                target.ctypes.data, pointer, target.nbytes, stream
            ),
        )
        self.synchronize()

    def fill_zeros(self, pointer: int, size_bytes: int) -> None:
        self._do(
            "clear memory",
            lambda cuda, stream: cuda.cuMemsetD8Async(pointer, 0, size_bytes, stream),
        )

    def record(self) -> DriverEvent:
        self._device.activate()
        event = DriverEvent(self._device)
        self._do("record an event", lambda cuda, stream: cuda.cuEventRecord(event.native, stream))
        return event

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, DriverEvent)
        self._do(
            "wait for an event",
            lambda cuda, stream: cuda.cuStreamWaitEvent(stream, event.native, 0),
        )

    def order_before(self, handle: int) -> None:
        event = self.record()
        cuda = self._device.cuda
        waiting = cuda.cuStreamWaitEvent(cuda.CUstream(handle), event.native, 0)
        self._device.check("let another stream wait", waiting)

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph:
        self._device.collect()
        # As trtexec does: what is unsafe on this thread fails, other threads are left alone.
        mode = self._device.cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._do("begin a capture", lambda cuda, stream: cuda.cuStreamBeginCapture(stream, mode))
        self._device.begin_capture()
        try:
            enqueue()
        except BaseException:
            # Ended in any case, or the stream could not be used again.
            _, graph = self._device.cuda.cuStreamEndCapture(self.native)
            if graph is not None and int(graph):
                self._device.cuda.cuGraphDestroy(graph)
            raise
        else:
            ended = self._device.cuda.cuStreamEndCapture(self.native)
        finally:
            self._device.end_capture()
        return self._instantiated(self._device.check("capture the calls", ended))

    def _instantiated(self, graph: Any) -> DriverGraph:
        cuda, device = self._device.cuda, self._device
        try:
            native = device.check("make a CUDA graph", cuda.cuGraphInstantiate(graph, 0))
        finally:
            cuda.cuGraphDestroy(graph)
        made = DriverGraph(device, self, native)
        self._do("upload a CUDA graph", lambda cuda, stream: cuda.cuGraphUpload(native, stream))
        return made

    def synchronize(self) -> None:
        self._do("finish its work", lambda cuda, stream: cuda.cuStreamSynchronize(stream))

    def close(self) -> None:
        if self._is_closed:
            return
        try:
            self.synchronize()
            if self._is_ours:
                self._do("free a stream", lambda cuda, stream: cuda.cuStreamDestroy(stream))
        finally:
            self._is_closed = True

    def _do(self, action: str, call: Callable[[Any, Any], tuple[Any, ...]]) -> None:
        self._device.activate()
        self._device.check(action, call(self._device.cuda, self.native))

    def _check_open(self) -> None:
        if self._is_closed:
            raise RenderError("the runtime was closed; open it again")


def stream_handle(external: object) -> int:
    """The `cudaStream_t` of a host's stream. Raises `InputError` for a default one, or none."""
    protocol = getattr(external, "__cuda_stream__", None)
    if protocol is not None:
        # A method by the protocol; torch and CuPy had it as a tuple at first.
        _, handle = protocol() if callable(protocol) else protocol
    else:
        handle = external
    if not isinstance(handle, int) or isinstance(handle, bool):
        raise InputError(
            f"a stream is a cudaStream_t as a number, or an object with __cuda_stream__; found "
            f"{type(external).__name__}"
        )
    if handle in _DEFAULT_STREAMS:
        raise InputError(
            "expected a stream of its own, found a default stream, which cannot be captured in a "
            "CUDA graph; make one, such as torch.cuda.Stream()"
        )
    return handle


def _text(words: object) -> str:
    return words.decode() if isinstance(words, bytes) else str(words)


def open_device(gpu: Gpu) -> Device:
    """The GPU that `find_gpu` found.

    Raises `RuntimeUnavailableError` without the package cuda-bindings.
    """
    try:
        from cuda.bindings import driver  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"a GPU needs the package cuda-bindings ({error}); run `pip install cuda-bindings`, "
            "or use `--backend onnxruntime`"
        ) from error
    return DriverDevice(gpu, driver)
