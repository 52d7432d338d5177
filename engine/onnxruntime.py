"""ONNX Runtime on the CPU: the default backend, and the oracle for every other one.

Tensors are NumPy arrays that the session reads and writes in place through I/O binding, so a call
copies nothing and returns when its work is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from meancache_trt.engine.binding import check_binding
from meancache_trt.engine.mapped_weights import has_linked_weights, mapped_weights
from meancache_trt.engine.memory import available_bytes
from meancache_trt.errors import BundleError, RenderError, RuntimeUnavailableError
from meancache_trt.meancache.runtime import Call, Tensor, TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
    "tensor(bfloat16)": "bfloat16",
}


class HostTensor:
    """A C-contiguous NumPy array with a fixed address."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return str(self.array.dtype)

    def write(self, value: NDArray[Any]) -> None:
        """Copy `value` in. Raises `RenderError` where shape or dtype differ."""
        if value.shape != self.array.shape or value.dtype != self.array.dtype:
            raise RenderError(
                f"expected {self.dtype} of shape {self.shape}, found {value.dtype} of shape "
                f"{value.shape}; prepare a loop for this shape"
            )
        np.copyto(self.array, value)

    def read(self) -> NDArray[Any]:
        return self.array.copy()

    def view(self, shape: tuple[int, ...]) -> HostTensor:
        return HostTensor(self.array.reshape(shape))


class _Bound:
    """A session with all inputs and outputs bound. Holds the tensors, so that they stay alive."""

    def __init__(self, session: Any, binding: Any, tensors: Mapping[str, Tensor]) -> None:
        self._session, self._binding, self._tensors = session, binding, tensors

    def enqueue(self) -> None:
        self._session.run_with_iobinding(self._binding)


class CallSequence:
    """Calls that are run one by one."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = tuple(calls)

    def enqueue(self) -> None:
        for call in self._calls:
            call.enqueue()


class OnnxRuntimeGraph:
    """An inference session on the CPU."""

    def __init__(self, session: Any, weights: Sequence[Any] = ()) -> None:
        self._session = session
        self._weights = weights  # mapped memory that the session reads
        self.inputs = {value.name: _spec(value) for value in session.get_inputs()}
        self.outputs = {value.name: _spec(value) for value in session.get_outputs()}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs, in memory of their own, for inputs of any size."""
        names = list(self.outputs)
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def bind(self, tensors: Mapping[str, Tensor]) -> Call:
        """Fix the memory of all inputs and outputs. Raises `RenderError` for a wrong fit."""
        check_binding({**self.inputs, **self.outputs}, tensors)
        binding = self._session.io_binding()
        for name, tensor in tensors.items():
            bind = binding.bind_input if name in self.inputs else binding.bind_output
            bind(name, "cpu", 0, np.dtype(tensor.dtype), tensor.shape, _address(tensor))
        return _Bound(self._session, binding, dict(tensors))


class OnnxRuntime:
    """The runtime. `threads` is the number of cores a graph may use; 0 leaves it to the library.

    A frugal one reads weights where they are stored and casts them when they are used, for graphs
    that run a few times: it holds no second copy of all weights in float32.

    Raises `RuntimeUnavailableError` where onnxruntime is not installed.
    """

    name = "onnxruntime-cpu"
    device = "cpu"
    precisions = ("float32",)  # it has no bfloat16 on the CPU

    def __init__(self, threads: int = 0, *, is_frugal: bool = False) -> None:
        try:
            import onnxruntime  # noqa: PLC0415  (an optional dependency, imported where it is used)
        except ImportError as error:
            raise RuntimeUnavailableError(
                "the backend onnxruntime needs the package onnxruntime, which is not installed; "
                "run `pip install 'meancache-trt[cpu]'`"
            ) from error
        self._library = onnxruntime
        self.version = str(onnxruntime.__version__)
        self._threads = threads
        self._is_frugal = is_frugal

    def load(self, path: Path, *, is_light: bool = False) -> OnnxRuntimeGraph:
        """Load an ONNX file. Raises `BundleError` with the library's words where it refuses.

        A light graph runs on one thread: waking a second costs more than it saves.
        """
        options = self._library.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1 if is_light else self._threads
        # Each session has threads of its own, which spin for a while after a run and so take the
        # cores from the next graph: without this a loop that follows a decode starts slowly.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = ["CPUExecutionProvider"]
        session, values = open_session(
            self._library, path, options, providers, **self._frugality(options)
        )
        return OnnxRuntimeGraph(session, weights=values)

    def _frugality(self, options: Any) -> dict[str, list[str]]:
        """Further arguments of a session, after settings of its options."""
        if not self._is_frugal:
            return {}
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # which keeps what it has had, and copies weights
        return {"disabled_optimizers": ["ConstantFolding"]}  # it would cast the weights

    def zeros(self, shape: Sequence[int], dtype: str) -> HostTensor:
        return HostTensor(np.zeros(tuple(shape), dtype))

    def tensor(self, value: NDArray[Any]) -> HostTensor:
        return HostTensor(np.array(value, order="C"))

    def from_dlpack(self, value: Any) -> HostTensor:
        """A tensor over another library's host memory, which NumPy keeps alive; copies nothing.

        Calls are done when they return, so there is nothing to wait for. Raises `RenderError`.
        """
        try:
            array = np.from_dlpack(value)
        except (AttributeError, BufferError, RuntimeError) as error:
            raise RenderError(
                f"ONNX Runtime on the CPU takes host memory by DLPack, found {type(value).__name__}"
                f": {error}; move it to the CPU, in an element type that NumPy has"
            ) from error
        if not array.flags.c_contiguous:
            raise RenderError(
                f"ONNX Runtime takes contiguous memory, found strides {array.strides} of shape "
                f"{array.shape}; copy it first"
            )
        return HostTensor(array)

    def sequence(self, calls: Sequence[Call]) -> Call:
        return CallSequence(calls)

    def synchronize(self) -> None:
        """Do nothing: calls return when they are done."""

    def lane(self) -> Self:
        """The runtime itself: each call runs in the thread that enqueues it."""
        return self

    def turn(self) -> AbstractContextManager[object]:
        """Keep nobody out: sessions may run in several threads at once."""
        return nullcontext()

    def free_bytes(self) -> int:
        """Memory of the machine that is free."""
        return available_bytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


def open_session(
    library: Any,
    path: Path,
    options: Any,
    providers: Sequence[Any],
    *,
    disabled_optimizers: Sequence[str] = (),
) -> tuple[Any, list[Any]]:
    """An inference session, and the mapped memory that it reads.

    Raises `BundleError` with the library's words where it refuses the graph.
    """
    names, values = mapped_weights(path, library) if has_linked_weights(path) else ([], [])
    try:
        if names:
            options.add_external_initializers(names, values)
        session = library.InferenceSession(
            str(path),
            options,
            providers=list(providers),
            disabled_optimizers=list(disabled_optimizers),
            enable_fallback=0,  # it would go on with other providers than were asked for
        )
    except Exception as error:
        # The library raises types of its own that share no public base.
        raise BundleError(
            f"ONNX Runtime {library.__version__} cannot load {path}: {error}; build the "
            "bundle again, or install the version that it was checked with"
        ) from error
    return session, values


def _spec(value: Any) -> TensorSpec:
    return TensorSpec(value.name, _DTYPES.get(value.type, value.type), tuple(value.shape))


def _address(tensor: Tensor) -> int:
    if not isinstance(tensor, HostTensor):
        raise RenderError(
            f"ONNX Runtime on the CPU binds its own tensors, found {type(tensor).__name__}"
        )
    return int(tensor.array.ctypes.data)
