"""ONNX Runtime with a CUDA provider, without CUDA: its CPU provider over the fake device's memory.

What a session is given is checked: the stream has to live, tensors are bound as CUDA memory. Work
runs when somebody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from meancache_trt.engine.onnxruntime import HostTensor, OnnxRuntimeGraph
from tests.fakes.cuda import FakeDevice, Operation, RuleBroken

Bound = dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]


class FakeBinding:
    def __init__(self) -> None:
        self.bound: Bound = {}

    def bind_input(self, name: str, *arguments: Any) -> None:
        self._bind(name, *arguments)

    def bind_output(self, name: str, *arguments: Any) -> None:
        self._bind(name, *arguments)

    def _bind(
        self, name: str, kind: str, index: int, dtype: Any, shape: Sequence[int], pointer: int
    ) -> None:
        if kind != "cuda" or index != 0:
            raise RuleBroken(f"{name} is bound as {kind}:{index}")
        self.bound[name] = (pointer, tuple(shape), np.dtype(dtype))


class FakeLibrary:
    """The module onnxruntime. `uncapturable` are files that a session refuses to capture.

    Attributes:
        runs: file, gpu_graph_id and whether the host waits, of every run.
        options: of the CUDA provider, by file.
    """

    __version__ = onnxruntime.__version__
    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions

    def __init__(
        self, device: FakeDevice, *, uncapturable: Sequence[str] = (), starts: bool = True
    ) -> None:
        self.device, self.uncapturable, self.starts = device, uncapturable, starts
        self.runs: list[tuple[str, str, bool]] = []
        self.options: dict[str, dict[str, str]] = {}
        self.fails = ""

    def InferenceSession(  # noqa: N802  (its name)
        self, path: str, options: Any, *, providers: Any, **_: Any
    ) -> FakeSession:
        (name, provider), cpu = providers
        assert (name, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        if provider["enable_cuda_graph"] == "1" and Path(path).name in self.uncapturable:
            raise RuntimeError("not all nodes are on the GPU")
        self.options[Path(path).name] = provider
        session = onnxruntime.InferenceSession(path, options, providers=[cpu])
        return FakeSession(self, Path(path).name, session, provider)


class FakeSession:
    def __init__(self, library: FakeLibrary, file: str, session: Any, provider: Any) -> None:
        self._library, self._file, self._provider = library, file, provider
        self._graph = OnnxRuntimeGraph(session)
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"] if self._library.starts else ["CPUExecutionProvider"]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        if self._library.fails:
            raise RuntimeError(self._library.fails)
        device = self._library.device
        stream = device.streams[int(self._provider["user_compute_stream"])]
        waits = options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
        number = options.get_run_config_entry("gpu_graph_id")
        self._library.runs.append((self._file, number, waits))
        bound, graph = dict(binding.bound), self._graph

        def run() -> None:
            arrays = {}
            for name, (pointer, shape, dtype) in bound.items():
                size = int(np.prod(shape)) * dtype.itemsize
                array = device.bytes_at(pointer, size).view(dtype).reshape(shape)
                arrays[name] = HostTensor(array)
            graph.bind(arrays).enqueue()

        stream.enqueue(Operation(run))
