"""The driver's interface without a driver: what it is asked, and the answers that a test gives."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cuda.bindings import driver as real

STATUS = real.CUresult
OK = STATUS.CUDA_SUCCESS
_VALUES: dict[str, Any] = {
    "cuDeviceGet": 0,
    "cuDevicePrimaryCtxRetain": "context",
    "cuStreamCreate": 0x5000,
    "cuEventCreate": "event",
    "cuStreamEndCapture": 0x7000,
    "cuGraphInstantiate": "executable",
    "cuGetErrorName": b"CUDA_ERROR_OF_A_TEST",
    "cuGetErrorString": b"words of the driver",
}
_NOTHING_BACK = frozenset({"cuInit", "cuCtxSetCurrent", "cuCtxSynchronize"})


class FakeDriver:
    """Each function returns success and a value; `fails` gives another status by name.

    Names that the real module lacks are refused. `calls` are names and arguments in order.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fails: dict[str, Any] = {}
        self._next_pointer = 0x100000

    def __getattr__(self, name: str) -> Any:
        found = getattr(real, name)  # raises where there is no such thing
        if not name.startswith("cu") or isinstance(found, type):
            return found

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            if name in self.fails:
                return (self.fails[name], *self._values(name))
            return (OK, *self._values(name))

        return call

    def _values(self, name: str) -> tuple[Any, ...]:
        if name == "cuMemAlloc":
            self._next_pointer += 0x1000
            return (self._next_pointer,)
        if name == "cuMemGetInfo":
            return (3 << 20, 8 << 20)
        return (_VALUES[name],) if name in _VALUES else ()

    @property
    def names(self) -> list[str]:
        """What was called, without the calls that select the GPU."""
        return [name for name, _ in self.calls if name not in _NOTHING_BACK]

    def count(self, name: str) -> int:
        return Counter(called for called, _ in self.calls)[name]
