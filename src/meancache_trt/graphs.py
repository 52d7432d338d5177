"""The graphs of a bundle on a runtime."""

from __future__ import annotations

import threading

from meancache_trt.bundle import Bundle
from meancache_trt.manifest import Component
from meancache_trt.meancache.runtime import Graph, Runtime
from meancache_trt.meancache.schedule import TRANSFORMERS


class Graphs:
    """The graphs of a bundle on one runtime, each loaded at its first use.

    `precision` is that of the transformers, None for what the runtime prefers.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, precision: str | None = None) -> None:
        self.bundle, self.runtime, self._precision = bundle, runtime, precision
        self._loaded: dict[str, Graph] = {}
        self._lock = threading.Lock()

    def network(self, part: str) -> Component:
        """A network in the precision that the runtime prefers of those that there are.

        Raises `BundleError` where a transformer is not there in the precision asked for.
        """
        precisions = self.runtime.precisions
        if self._precision is not None:
            others = () if part in TRANSFORMERS else precisions
            precisions = (self._precision, *others)
        return self.bundle.export.component_in(part, precisions)[1]

    def graph(self, component: Component) -> Graph:
        """The loaded graph of a component."""
        with self._lock:  # threads of one stage ask for the same graph
            if component.path not in self._loaded:
                path = self.bundle.component_path(component)
                is_light = not component.weight_bytes
                self._loaded[component.path] = self.runtime.load(path, is_light=is_light)
            return self._loaded[component.path]

    def lane(self) -> Graphs:
        """The graphs on a lane of the runtime; these where that is the runtime itself."""
        lane = self.runtime.lane()
        return self if lane is self.runtime else Graphs(self.bundle, lane, self._precision)

    def drop(self, component: Component) -> None:
        """Forget a graph; its memory goes with the last call that is bound to it."""
        self._loaded.pop(component.path, None)
