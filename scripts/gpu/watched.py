"""A runtime that is watched: its calls are kept, and its sequences captured or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meancache_trt.meancache.runtime import Call, Graph, Runtime, Tensor, TensorSpec


@dataclass(frozen=True)
class PlainSequence:
    """Calls that are enqueued one by one, which no graph was captured of."""

    calls: tuple[Call, ...]

    def enqueue(self) -> None:
        """Enqueue each in order."""
        for call in self.calls:
            call.enqueue()


@dataclass(frozen=True)
class WatchedGraph:
    """A graph that keeps the calls which it is bound to."""

    graph: Graph
    calls: list[Call]

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Those of the graph."""
        return self.graph.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Those of the graph."""
        return self.graph.outputs

    def bind(self, tensors: Mapping[str, Tensor]) -> Call:
        """Bind the graph; its own call, not a wrapped one, so that a runtime can capture it."""
        self.calls.append(self.graph.bind(tensors))
        return self.calls[-1]


@dataclass(frozen=True)
class Watched:
    """Another runtime, whose graphs keep their calls by the path of their file.

    Without `is_captured` a sequence is its calls, enqueued one after the other. `sequences` are all
    that were made, with how many calls each has.
    """

    runtime: Runtime
    is_captured: bool = True
    calls: dict[Path, list[Call]] = field(default_factory=dict)
    sequences: list[tuple[int, Call]] = field(default_factory=list)

    def load(self, path: Path, *, is_light: bool = False) -> WatchedGraph:
        """The runtime's graph, watched."""
        graph = self.runtime.load(path, is_light=is_light)
        return WatchedGraph(graph, self.calls.setdefault(path, []))

    def sequence(self, calls: Sequence[Call]) -> Call:
        """The runtime's sequence, or a plain one."""
        plain = PlainSequence(tuple(calls))
        made = self.runtime.sequence(calls) if self.is_captured else plain
        self.sequences.append((len(calls), made))
        return made

    def __getattr__(self, name: str) -> Any:
        """Everything else is the runtime's."""
        return getattr(self.runtime, name)
