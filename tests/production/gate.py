"""A runtime whose loops wait for a test."""

from __future__ import annotations

import threading

from meancache_trt.engine.onnxruntime import OnnxRuntime
from meancache_trt.errors import RenderError

LONG_S = 120.0
"""Far more than anything here takes: a test that waits for so long has failed."""


class Gate(OnnxRuntime):
    """ONNX Runtime whose loops can be held after each evaluation; text and pictures pass.

    The next `faults` waits for a loop fail.
    """

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.evaluations = self.faults = 0
        self._is_open = threading.Event()
        self._is_reached = threading.Event()
        self.open()

    def lane(self) -> OnnxRuntime:
        return OnnxRuntime(threads=1)

    def synchronize(self) -> None:
        self.evaluations += 1  # and once for the preparation and the end of each loop
        if not self._is_open.is_set():
            self._is_reached.set()
            assert self._is_open.wait(LONG_S)
        if self.faults:
            self.faults -= 1
            raise RenderError("the device stumbled")

    def open(self) -> None:
        self._is_open.set()

    def close(self) -> None:
        self._is_reached.clear()
        self._is_open.clear()

    def wait_until_reached(self) -> None:
        assert self._is_reached.wait(LONG_S)
