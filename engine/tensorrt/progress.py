"""How far a build is, from TensorRT's nested phases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from meancache_trt.engine.tensorrt.library import Library

Advance = Callable[[float], bool]
"""Gets the share of a build that is done, 0 to 1; returns whether it is to go on."""


@dataclass
class _Phase:
    steps: int
    parent: str | None
    done: int = 0
    children: set[str] = field(default_factory=set)


class Phases:
    """The share that is done of phases within phases. Called from several threads.

    A phase's steps count alike, and the phases that began within it share the step it is at: what
    they will be is not known before. Most of the time passes within one of them (the compilation
    of the graph), which has no steps.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()
        self._most = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` began."""
        with self._lock:
            self._phases[name] = _Phase(max(steps, 1), parent)
            if parent in self._phases:
                self._phases[parent].children.add(name)

    def complete(self, name: str, step: int) -> None:
        """A step, counted from 0, is done."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = max(phase.done, min(step + 1, phase.steps))
                phase.children.clear()

    def finish(self, name: str) -> None:
        """A phase is over, perhaps before all of its steps."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = phase.steps

    def share(self) -> float:
        """What is done, 0 to 1; never less than before."""
        with self._lock:
            roots = [name for name, phase in self._phases.items() if phase.parent is None]
            if roots:
                self._most = max(self._most, self._share(roots[-1]))
            return self._most

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        if phase.done == phase.steps:
            return 1.0
        begun = [self._share(child) for child in phase.children]
        within = sum(begun) / (len(begun) + 1) if begun else 0.0
        return (phase.done + within) / phase.steps


def monitor(library: Library, advance: Advance) -> Any:
    """An `IProgressMonitor` of the library that tells `advance`; keep it as long as the build."""
    base: Any = library.module.IProgressMonitor
    phases = Phases()

    class Monitor(base):  # type: ignore[misc]  # known at run time only
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.complete(phase_name, step)
            return advance(phases.share())

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)
            advance(phases.share())

    return Monitor()
