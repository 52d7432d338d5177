"""What the fake TensorRT shares: enumerations, plans, and a world that watches its objects."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path

import msgspec

from meancache_trt.engine.onnxruntime import OnnxRuntime, OnnxRuntimeGraph
from meancache_trt.engine.tensorrt.record import ShapeRange
from meancache_trt.meancache.hashing import sha256_of
from tests.fakes.cuda import FakeDevice

MAGIC = "fake plan"
VERSION = "1.7.1.116"


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


DataType = Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8")
TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")
TensorLocation = Enum("TensorLocation", "DEVICE HOST")
ExecutionContextAllocationStrategy = Enum(
    "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
)
DynamicShapesKernelSpecializationStrategy = Enum(
    "DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE"
)
EngineValidity = Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class PlanText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a fake plan's file says. `is_capturable` False is an engine that cannot be captured."""

    graph: str
    version: str
    compute_capability: str
    profile: dict[str, ShapeRange]
    streamable_bytes: int = 0
    is_capturable: bool = True
    fails: str = ""
    magic: str = MAGIC


def decoded(buffer: object) -> PlanText | None:
    try:
        plan = msgspec.json.decode(bytes(memoryview(buffer)), type=PlanText)  # type: ignore[arg-type]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return plan if plan.magic == MAGIC else None


_LOADED: dict[tuple[str, ...], OnnxRuntimeGraph] = {}  # copies of one bundle share them


def _loaded(path: str, digests: tuple[str, ...]) -> OnnxRuntimeGraph:
    if digests not in _LOADED:
        _LOADED[digests] = OnnxRuntime(1).load(Path(path))
    return _LOADED[digests]


@dataclass
class World:
    """What the objects of one fake library share."""

    device: FakeDevice
    version: str
    graphs: dict[str, OnnxRuntimeGraph] = field(default_factory=dict)
    compiled: list[str] = field(default_factory=list)
    alive: dict[str, int] = field(default_factory=lambda: {"context": 0, "engine": 0, "runtime": 0})

    def graph(self, path: str) -> OnnxRuntimeGraph:
        """The same kernels on the CPU, on one thread."""
        if path not in self.graphs:
            files = [Path(path), *sorted(Path(path).parent.glob("*.safetensors"))]
            self.graphs[path] = _loaded(path, tuple(map(sha256_of, files)))
        return self.graphs[path]

    def born(self, what: str, thing: object, users: Callable[[], int] = lambda: 0) -> Life:
        """Watch an object of the library, whose end has to come after that of its `users`."""
        self.alive[what] += 1
        life = Life()

        def ended() -> None:
            life.is_over = True
            self.alive[what] -= 1
            self.device.order.append(what)
            if users():
                self.device.violations.append(f"a {what} ended before what uses it")
            if self.device.is_capturing:
                self.device.violations.append(f"a {what} ended while a capture is under way")
            if self.device.is_closed:
                self.device.violations.append(f"a {what} ended after its device")

        weakref.finalize(thing, ended).atexit = False
        return life


@dataclass
class Life:
    """Whether a native object is gone, known to those who must not keep it alive."""

    is_over: bool = False


class Strict:
    """Refuses to be given attributes that it does not have, as pybind's classes do."""

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        super().__setattr__(name, value)
