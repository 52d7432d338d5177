"""Bound calls, and sequences of them that become one CUDA graph."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from meancache_trt.engine.cuda.device import CapturedGraph, Stream
from meancache_trt.engine.cuda.tensors import DeviceTensor
from meancache_trt.engine.tensorrt.contexts import Context
from meancache_trt.errors import RenderError

Mode = Literal["unused", "plain", "captured"]


class BoundCall:
    """A context with the address of every input and output; holds the tensors."""

    def __init__(self, context: Context, tensors: Mapping[str, DeviceTensor]) -> None:
        self.context = context
        self._tensors = dict(tensors)
        self._addresses = {name: tensor.pointer for name, tensor in tensors.items()}

    def enqueue(self) -> None:
        """Start it on the stream of its lane. Raises `RenderError` where TensorRT refuses."""
        self.context.enqueue(self._addresses)


class CapturedSequence:
    """Calls in order: run one by one at first, captured at the second use, then replayed.

    The first run is a run like any other, whose results count: it lets TensorRT allocate and
    compile whatever it does at a first enqueue, which a capture cannot hold. So also after the
    activation block has moved. What cannot be captured stays a list of calls, and says so.

    Attributes:
        mode: how the last `enqueue` ran.
        problem: why it is not captured; None where nothing speaks against it.
    """

    def __init__(
        self, stream: Stream, calls: Sequence[BoundCall], note: Callable[[str], None]
    ) -> None:
        self._graph: CapturedGraph | None = None  # first: it goes before what it runs
        self._stream, self._calls, self._note = stream, tuple(calls), note
        self._generation = 0  # of the activation block at the last plain run
        self.mode: Mode = "unused"
        self.problem: str | None = None

    def enqueue(self) -> None:
        if not self._calls:
            return
        generation = self._calls[0].context.generation
        if self._generation != generation:
            self.close()
            self._run_plainly()
            self._generation = generation
            return
        if self._graph is None and self.problem is None:
            self._capture()
        if self._graph is None:
            self._run_plainly()
        else:
            self._graph.launch()
            self.mode = "captured"

    def close(self) -> None:
        """Free the CUDA graph; the next uses run plainly and capture again."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()

    def _run_plainly(self) -> None:
        self.mode = "plain"
        for call in self._calls:
            call.enqueue()

    def _capture(self) -> None:
        contexts = dict.fromkeys(call.context for call in self._calls)
        problems = [context.why_not_captured() for context in contexts]
        self.problem = next((problem for problem in problems if problem), None)
        if self.problem is None:
            try:
                with _no_collection():
                    self._graph = self._stream.capture(self._run_plainly)
            except RenderError as error:
                self.problem = str(error)
        if self.problem is not None:
            self._note(f"calls run one by one and not as a CUDA graph: {self.problem}")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from freeing what TensorRT holds, which a capture under way does not allow."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
