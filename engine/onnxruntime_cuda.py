"""ONNX Runtime on an NVIDIA GPU: the GPU path where TensorRT does not run, or has no plans.

It runs the float32 graphs, in float32 and not in TensorFloat-32, over the tensors and on the stream
that the TensorRT runtimes have too. Where it can hold a graph's work in a CUDA graph of its own, it
does, one for each bound call.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from meancache_trt.engine.binding import check_binding
from meancache_trt.engine.cuda.device import Device
from meancache_trt.engine.cuda.runtime import DeviceRuntime
from meancache_trt.engine.cuda.tensors import DeviceTensor
from meancache_trt.engine.onnxruntime import CallSequence, OnnxRuntimeGraph, open_session
from meancache_trt.engine.probe import Gpu
from meancache_trt.errors import BundleError, RenderError, RuntimeUnavailableError
from meancache_trt.meancache.runtime import Call, Tensor

_PROVIDER = "CUDAExecutionProvider"
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, which NumPy has no type for
_NO_GRAPH = "-1"  # of the run option gpu_graph_id: neither capture nor replay


class OnnxRuntimeCuda(DeviceRuntime):
    """The runtime. `threads` is for what the provider leaves to the CPU; 0 means all cores.

    Args:
        library: onnxruntime, with its CUDA provider.
        device: the GPU, which the runtime closes.
        threads: see above.
        stream: a host's own to work on; see `Device.stream`.
    """

    name = "onnxruntime-cuda"
    # Whether its Attention of opset 23 runs in bfloat16 was not established: no GPU to try it.
    precisions = ("float32",)

    def __init__(
        self, library: Any, device: Device, *, threads: int = 0, stream: object | None = None
    ) -> None:
        super().__init__(device, stream)
        self._library, self._threads = library, threads
        self.version = str(library.__version__)
        self._graphs: weakref.WeakSet[OnnxRuntimeCudaGraph] = weakref.WeakSet()

    def load(self, path: Path, *, is_light: bool = False) -> OnnxRuntimeCudaGraph:
        """Load an ONNX file. Raises `BundleError` with the library's words where it refuses.

        Raises `RuntimeUnavailableError` where the provider does not start. A graph of which parts
        stay on the CPU cannot be held in a CUDA graph; `notes` then says so.
        """
        self.check_open()
        try:
            session, weights = self._open(path, is_light=is_light, is_captured=True)
            is_captured = True
        except BundleError as error:
            session, weights = self._open(path, is_light=is_light, is_captured=False)
            is_captured = False
            self.note(f"{path.name} does not run as a CUDA graph: {error.__cause__}")
        graph = OnnxRuntimeCudaGraph(
            self, self._library, session, weights=weights, is_captured=is_captured
        )
        self._graphs.add(graph)
        return graph

    def lane(self) -> Self:
        """The runtime itself: a session stays on the stream that it was made with."""
        return self

    def _free(self) -> None:
        for graph in list(self._graphs):
            graph.close()

    def sequence(self, calls: Sequence[Call]) -> Call:
        return CallSequence(calls)

    def _open(self, path: Path, *, is_light: bool, is_captured: bool) -> tuple[Any, list[Any]]:
        options = self._library.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1 if is_light else self._threads
        provider = {
            "device_id": str(self.cuda.dlpack_device[1]),
            "user_compute_stream": str(self.stream.handle),
            "enable_cuda_graph": str(int(is_captured)),
            "use_tf32": "0",  # ten bits of mantissa would not be float32
        }
        self.cuda.activate()
        session, weights = open_session(
            self._library, path, options, [(_PROVIDER, provider), "CPUExecutionProvider"]
        )
        if _PROVIDER not in session.get_providers():
            raise RuntimeUnavailableError(
                "ONNX Runtime has a CUDA provider, but it does not start; install the CUDA and "
                f"cuDNN libraries that onnxruntime-gpu {self.version} needs, or use `--backend "
                "onnxruntime`"
            )
        return session, weights


class OnnxRuntimeCudaGraph(OnnxRuntimeGraph):
    """An inference session on the GPU. `is_captured` says whether it may make CUDA graphs."""

    def __init__(
        self,
        runtime: OnnxRuntimeCuda,
        library: Any,
        session: Any,
        *,
        weights: Sequence[Any],
        is_captured: bool,
    ) -> None:
        super().__init__(session, weights)
        self._runtime, self._library = runtime, library
        self._numbers: Iterator[int] | None = itertools.count(1) if is_captured else None
        self._calls: weakref.WeakSet[_BoundCall] = weakref.WeakSet()

    def bind(self, tensors: Mapping[str, Tensor]) -> Call:
        """Fix the memory of all inputs and outputs. Raises `RenderError` for a wrong fit."""
        self._runtime.check_open()
        check_binding({**self.inputs, **self.outputs}, tensors)
        binding = self._session.io_binding()
        index = self._runtime.cuda.dlpack_device[1]
        for name, tensor in tensors.items():
            bind = binding.bind_input if name in self.inputs else binding.bind_output
            kind: Any = _BFLOAT16 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype)
            bind(name, "cuda", index, kind, tensor.shape, _address(tensor))
        number = None if self._numbers is None else next(self._numbers)
        call = _BoundCall(self._runtime, self, binding, tensors, self._run_options(number))
        self._calls.add(call)
        return call

    def close(self) -> None:
        """Free the session while its stream lives; nothing may be using it."""
        for call in list(self._calls):
            call.close()
        self._session = None

    def run_bound(self, binding: Any, options: Any) -> None:
        """Enqueue a bound call. Raises `RenderError` with the library's words where it fails."""
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # the library's types share no public base
            raise RenderError(f"ONNX Runtime on the GPU failed: {error}") from error

    def _run_options(self, number: int | None) -> tuple[Any, Any]:
        """For the first run of a call, which is not captured, and for those after it."""
        first = self._library.RunOptions()
        later = self._library.RunOptions()
        for options in (first, later):
            # All work is in order on our own stream, and who reads from it waits.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        first.add_run_config_entry("gpu_graph_id", _NO_GRAPH)
        later.add_run_config_entry("gpu_graph_id", _NO_GRAPH if number is None else str(number))
        return first, later


class _BoundCall:
    """A session with all inputs and outputs bound; holds the tensors and the session.

    Its first run makes no CUDA graph: calls that are bound to be run once would fill memory.
    """

    def __init__(
        self,
        runtime: OnnxRuntimeCuda,
        graph: OnnxRuntimeCudaGraph,
        binding: Any,
        tensors: Mapping[str, Tensor],
        options: tuple[Any, Any],
    ) -> None:
        self._runtime, self._graph, self._binding = runtime, graph, binding
        self._tensors, self._options = dict(tensors), options
        self._is_first = True

    def enqueue(self) -> None:
        self._runtime.check_open()
        self._runtime.cuda.activate()
        first, later = self._options
        self._graph.run_bound(self._binding, first if self._is_first else later)
        self._is_first = False

    def close(self) -> None:
        """Let go of the session."""
        self._binding = None


def open_onnxruntime_cuda(
    gpu: Gpu, *, threads: int = 0, stream: object | None = None
) -> OnnxRuntimeCuda:
    """The runtime on a GPU that was found.

    Raises `RuntimeUnavailableError` where onnxruntime is missing or has no CUDA provider.
    """
    remedy = (
        "`pip install onnxruntime-gpu` in the place of onnxruntime, or use `--backend onnxruntime`"
    )
    try:
        import onnxruntime  # noqa: PLC0415  (an optional dependency, imported where it is used)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"the backend onnxruntime_cuda needs onnxruntime-gpu ({error}); run {remedy}"
        ) from error
    if _PROVIDER not in onnxruntime.get_available_providers():
        raise RuntimeUnavailableError(
            f"expected an ONNX Runtime with {_PROVIDER}, found one without; run {remedy}"
        )
    from meancache_trt.engine.cuda.driver import open_device  # noqa: PLC0415  (only with a GPU)

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN from NVIDIA's packages, where they are there
    return OnnxRuntimeCuda(onnxruntime, open_device(gpu), threads=threads, stream=stream)


def _address(tensor: Tensor) -> int:
    if not isinstance(tensor, DeviceTensor):
        raise RenderError(
            f"ONNX Runtime on the GPU binds tensors of its device, found {type(tensor).__name__}"
        )
    return tensor.pointer
