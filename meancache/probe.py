"""Count and time the calls of a graph, for measurements."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from meancache_trt.meancache.runtime import Call, Graph, Tensor, TensorSpec


@dataclass
class Probe:
    """A graph that passes everything on and keeps the duration of each call, in milliseconds.

    Durations are those of `enqueue`: on a backend that returns before its work is done they are
    the host's share only.
    """

    graph: Graph
    calls_ms: list[float] = field(default_factory=list)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Those of the graph."""
        return self.graph.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Those of the graph."""
        return self.graph.outputs

    def bind(self, tensors: Mapping[str, Tensor]) -> Call:
        """Bind the graph; the call reports here."""
        return _ProbedCall(self, self.graph.bind(tensors))


@dataclass(frozen=True)
class _ProbedCall:
    probe: Probe
    call: Call

    def enqueue(self) -> None:
        start = time.perf_counter()
        self.call.enqueue()
        self.probe.calls_ms.append(1e3 * (time.perf_counter() - start))
