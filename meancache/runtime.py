"""What the loop asks of a backend: load a graph, hold tensors, enqueue calls.

A backend is a `Runtime`: `meancache_trt.engine.onnxruntime` on the CPU, `engine.onnxruntime_cuda`
and `engine.tensorrt.runtime` on a GPU. Everything above this protocol is the same on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from numpy.typing import NDArray


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a graph's input or output.

    `dtype` is a NumPy name such as "float32" or "int64"; a `str` in `shape` is a dynamic dimension.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Tensor(Protocol):
    """Memory that a runtime owns, of fixed shape and dtype. It lives as long as its object."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def write(self, value: NDArray[Any]) -> None:
        """Copy from host memory. Shape and dtype must be equal; synchronises."""

    def read(self) -> NDArray[Any]:
        """Copy to host memory; waits for the calls enqueued before."""

    def view(self, shape: tuple[int, ...]) -> Tensor:
        """The same memory, row-major, in another shape of as many elements."""


class Call(Protocol):
    """One or more graph executions with every address fixed."""

    def enqueue(self) -> None:
        """Start the work in order after earlier calls; may return before it is done."""


class Graph(Protocol):
    """A loaded graph that can be bound to tensors any number of times."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    def bind(self, tensors: Mapping[str, Tensor]) -> Call:
        """Fix the memory of every input and output, by name.

        Raises `RenderError` where a name is missing or unknown, or a shape or dtype does not fit.
        """


class Runtime(Protocol):
    """A backend on one device. A context manager; leaving it frees graphs and tensors."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Of the library that executes."""

    @property
    def device(self) -> str:
        """Where its tensors are, as torch names it, such as "cpu" or "cuda:0"."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """Which graphs it runs where a bundle has several of one network, the preferred first."""

    def load(self, path: Path, *, is_light: bool = False) -> Graph:
        """Load an ONNX graph (and the engine built from it, where the backend has one).

        `is_light` says that the graph has no weights, only elementwise work and moves.
        """

    def zeros(self, shape: Sequence[int], dtype: str) -> Tensor: ...

    def tensor(self, value: NDArray[Any]) -> Tensor:
        """A new tensor with the value's shape, dtype and contents."""

    def from_dlpack(self, value: Any) -> Tensor:
        """A tensor over memory that another library owns, by the DLPack protocol; copies nothing.

        `value` stays alive as long as the tensor. The runtime orders its own work after what the
        owner enqueued before; whoever reads or frees the memory elsewhere, or writes to it, calls
        `synchronize` first. Raises `RenderError` where the memory is not on the runtime's device,
        not contiguous, or of an element type that it lacks.
        """

    def sequence(self, calls: Sequence[Call]) -> Call:
        """Calls that always run in this order, as one (a CUDA graph where there is one)."""

    def synchronize(self) -> None:
        """Wait until everything enqueued is done."""

    def lane(self) -> Runtime:
        """A queue for another thread, whose work may overlap with this one's; it shares graphs.

        The runtime itself where it has no second queue, or needs none. Closed with the runtime.
        """

    def turn(self) -> AbstractContextManager[object]:
        """What a thread holds in every call but `synchronize` where several use a runtime.

        A runtime and its lanes have one, which a thread may take again while it holds it. It
        keeps nobody out where calls may run side by side.
        """

    def free_bytes(self) -> int:
        """Memory of its device that is free now."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
