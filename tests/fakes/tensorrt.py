"""The runtime interface of TensorRT without TensorRT: it runs graphs by ONNX Runtime, strictly.

It has exactly the attributes that this project touches, and what TensorRT demands is checked at
every call: `RuleBroken` where it is not kept. A plan is a small JSON file (`plans.py` writes it)
that names an ONNX graph and its profile. It stands for the orchestration alone: nothing here is
evidence about TensorRT.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meancache_trt.engine.cuda.device import ALIGNMENT_BYTES
from meancache_trt.engine.onnxruntime import HostTensor, OnnxRuntime, OnnxRuntimeGraph
from meancache_trt.engine.tensorrt.library import Flavour, Library
from meancache_trt.engine.tensorrt.record import Shape, ShapeRange
from meancache_trt.meancache.hashing import sha256_of
from tests.fakes.cuda import Block, FakeDevice, Operation, RuleBroken

MAGIC = "fake plan"
VERSION = "1.7.1.116"
CACHE_MAGIC = b"fake cache\n"
_BYTES_PER_VALUE = 4
_FIXED_BYTES = 1000  # not a multiple of the alignment, on purpose


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


_DTYPES = {
    "float32": DataType.FLOAT,
    "int64": DataType.INT64,
    "int32": DataType.INT32,
    "bool": DataType.BOOL,
}


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


class _Strict:
    """Refuses to be given attributes that it does not have, as pybind's classes do."""

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        super().__setattr__(name, value)


class IRuntimeCache(_Strict):
    def __init__(self, world: World) -> None:
        self._world, self._entries = world, set[bytes]()

    def deserialize(self, blob: object) -> bool:
        text = bytes(memoryview(blob))  # type: ignore[arg-type]
        if not text.startswith(CACHE_MAGIC + self._world.version.encode()):
            return False
        self._entries.update(text.splitlines()[2:])
        return True

    def serialize(self) -> bytes:
        head = CACHE_MAGIC + self._world.version.encode()
        return b"\n".join([head, *sorted(self._entries)])


class IRuntimeConfig(_Strict):
    def __init__(self, world: World) -> None:
        self._world = world
        self._allocation = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self._allocation = strategy


class IRuntimeConfigRtx(IRuntimeConfig):
    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._specialization = DynamicShapesKernelSpecializationStrategy.LAZY
        self._cache: IRuntimeCache | None = None

    @property
    def dynamic_shapes_kernel_specialization_strategy(
        self,
    ) -> DynamicShapesKernelSpecializationStrategy:
        return self._specialization

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(
        self, strategy: DynamicShapesKernelSpecializationStrategy
    ) -> None:
        self._specialization = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._world)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class IExecutionContext(_Strict):
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        world = engine._world
        if config._allocation != ExecutionContextAllocationStrategy.USER_MANAGED:
            raise RuleBroken("this fake knows user-managed activation memory only")
        self._world, self._plan, self._log = world, engine._plan, engine._log
        self._engine_life, self._graph = engine._life, engine._graph
        self._is_streaming = engine._budget < engine._plan.streamable_bytes
        self._needed = engine._activation_bytes
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._warm_shapes: dict[str, Shape] | None = None
        self._results: dict[str, Shape] | None = None
        self._life = world.born("context", self)
        self._config = config
        engine._contexts.add(self)
        _compile(world, config, self._plan)

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        if not self._plan.profile[name].holds(shape):
            self._log(f"{name} of shape {shape} is outside the profile")
            return False
        self._shapes[name], self._results = tuple(shape), None
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        if name in self._shapes:
            return self._shapes[name]
        if self._results is None:
            specs = self._graph.inputs
            feeds = {key: np.zeros(size, specs[key].dtype) for key, size in self._shapes.items()}
            self._results = {key: value.shape for key, value in self._graph.run(feeds).items()}
        return self._results[name]

    def update_device_memory_size_for_shapes(self) -> int:
        if self._shapes.keys() != self._plan.profile.keys():
            raise RuleBroken("the memory for activations was asked for before all shapes were set")
        return self._needed(self._shapes)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._graph.inputs and name not in self._graph.outputs:
            self._log(f"there is no tensor {name}")
            return False
        if memory % ALIGNMENT_BYTES:
            raise RuleBroken(f"{name} is at {memory:#x}, which is not aligned")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if stream_handle not in self._world.device.streams:
            raise RuleBroken(f"{stream_handle:#x} is a default stream, or none that lives")
        stream = self._world.device.streams[stream_handle]
        if self._plan.fails:
            self._log(self._plan.fails)
            return False
        self._world.device.activate()
        block = self._activation_block(stream)
        tensors = self._bound()
        if stream.captured is not None:
            self._check_capture()
            if not self._plan.is_capturable:
                self._log("operation not permitted when stream is capturing")
                return False
        else:
            self._warm_shapes = dict(self._shapes)
            self._world.device.enqueued.append(Path(self._plan.graph).as_posix())
        stream.enqueue(Operation(self._work(tensors, block), (block,)))
        return True

    def _activation_block(self, stream: object) -> Block:
        if self._memory is None:
            raise RuleBroken("there is no memory for activations")
        pointer, size = self._memory
        if pointer % ALIGNMENT_BYTES or size < self._needed(self._shapes):
            raise RuleBroken(f"the memory for activations, {size} bytes at {pointer:#x}, is unfit")
        block = self._world.device.block_at(pointer, size)
        others = [other for other in self._world.device.streams.values() if other is not stream]
        if any(block in operation.blocks for other in others for operation in other.pending):
            raise RuleBroken("two streams share memory for activations")
        return block

    def _bound(self) -> dict[str, tuple[int, Shape, np.dtype[Any]]]:
        """Address, shape and dtype of every tensor, once all of them are fit."""
        specs = {**self._graph.inputs, **self._graph.outputs}
        missing = specs.keys() - self._addresses.keys()
        if missing:
            raise RuleBroken(f"no address was set for {sorted(missing)}")
        bound = {}
        for name, spec in specs.items():
            shape, dtype = self.get_tensor_shape(name), np.dtype(spec.dtype)
            self._world.device.bytes_at(self._addresses[name], math.prod(shape) * dtype.itemsize)
            bound[name] = (self._addresses[name], shape, dtype)
        outputs = {bound[name][0] for name in self._graph.outputs}
        if outputs & {bound[name][0] for name in self._graph.inputs}:
            raise RuleBroken("a tensor is read and written by one call")
        return bound

    def _check_capture(self) -> None:
        if self._warm_shapes != self._shapes:
            raise RuleBroken("a capture before the first enqueue with these shapes")
        # Who can ask beforehand has to; without `is_stream_capturable` it only shows by failing.
        could_be_asked = hasattr(self, "is_stream_capturable")
        if self._is_streaming or (could_be_asked and not self._plan.is_capturable):
            raise RuleBroken("this engine cannot be captured")

    def _work(
        self, tensors: Mapping[str, tuple[int, Shape, np.dtype[Any]]], block: Block
    ) -> Callable[[], None]:
        """What runs later, without keeping this object alive."""
        life, engine_life, graph = self._life, self._engine_life, self._graph
        device = self._world.device

        def run() -> None:
            if life.is_over or engine_life.is_over:
                raise RuleBroken("work runs whose context or engine is gone")
            if not block.is_alive:
                raise RuleBroken("work runs whose memory for activations is gone")
            block.array[:] = np.random.default_rng(0).integers(256)  # it is scratch
            bound = {}
            for name, (pointer, shape, dtype) in tensors.items():
                size = math.prod(shape) * dtype.itemsize
                array = device.bytes_at(pointer, size).view(dtype).reshape(shape)
                bound[name] = HostTensor(array)
            graph.bind(bound).enqueue()

        return run


class IExecutionContextRtx(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        eager = DynamicShapesKernelSpecializationStrategy.EAGER
        assert isinstance(self._config, IRuntimeConfigRtx)
        if self._config._specialization != eager or not self._plan.is_capturable:
            self._log("a kernel is not ready to be captured")
            return False
        return stream in self._world.device.streams


class ICudaEngine(_Strict):
    _context_type: type[IExecutionContext] = IExecutionContext
    _config_type: type[IRuntimeConfig] = IRuntimeConfig

    def __init__(self, world: World, plan: PlanText, log: Callable[[str], None]) -> None:
        self._world, self._plan, self._log = world, plan, log
        self._graph = world.graph(plan.graph)
        self._budget = plan.streamable_bytes
        self._contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()
        contexts = self._contexts
        self._life = world.born("engine", self, lambda: len(contexts))
        self._names = [*self._graph.inputs, *self._graph.outputs]

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._graph.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _DTYPES[{**self._graph.inputs, **self._graph.outputs}[name].dtype]

    def get_tensor_shape(self, name: str) -> Shape:
        shape = {**self._graph.inputs, **self._graph.outputs}[name].shape
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_location(self, name: str) -> TensorLocation:
        assert name in self._names
        return TensorLocation.DEVICE

    @property
    def device_memory_size_v2(self) -> int:
        return self._activation_bytes({name: held.max for name, held in self._plan.profile.items()})

    @property
    def streamable_weights_size(self) -> int:
        return self._plan.streamable_bytes

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return _FIXED_BYTES

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if len(self._contexts):
            raise RuleBroken("the budget is set while there are contexts")
        if budget < 0:
            raise RuleBroken(f"a budget of {budget} bytes")
        self._budget = budget

    def create_runtime_config(self) -> IRuntimeConfig:
        return self._config_type(self._world)

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:
        self._world.device.forbid("creating a context")
        return self._context_type(self, runtime_config)

    @staticmethod
    def _activation_bytes(shapes: Mapping[str, Shape]) -> int:
        return _FIXED_BYTES + sum(_BYTES_PER_VALUE * math.prod(s) for s in shapes.values())


class ICudaEngineRtx(ICudaEngine):
    _context_type = IExecutionContextRtx
    _config_type = IRuntimeConfigRtx


class ICudaEngineOld(ICudaEngine):
    """An engine of a version that has no runtime configurations."""

    @property
    def create_runtime_config(self) -> Any:  # type: ignore[override]
        raise AttributeError("create_runtime_config")

    def create_execution_context(self, strategy: Any) -> IExecutionContext:
        config = IRuntimeConfig(self._world)
        config.set_execution_context_allocation_strategy(strategy)
        return super().create_execution_context(config)


class Runtime(_Strict):
    _engine_type: type[ICudaEngine] = ICudaEngine

    def __init__(self, world: World, logger: ILogger) -> None:
        self._world, self._logger, self._allowed = world, logger, False
        self._life = world.born("runtime", self, lambda: world.alive["engine"])

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, is_allowed: bool) -> None:
        if is_allowed:
            raise RuleBroken("a plan may bring code that runs on the host")

    def deserialize_cuda_engine(self, serialized_engine: NDArray[np.uint8]) -> ICudaEngine | None:
        self._world.device.activate()
        self._world.device.forbid("deserialising")
        plan = _decoded(serialized_engine)
        problem = "no magic tag" if plan is None else self._problem(plan)
        if plan is None or problem:
            self._log(f"deserialisation failed: {problem}")
            return None
        logger = self._logger  # and not this runtime, which an engine does not keep alive here
        return self._engine_type(
            self._world, plan, lambda message: logger.log(Severity.ERROR, message)
        )

    def _problem(self, plan: PlanText) -> str | None:
        if plan.version != self._world.version:
            return f"made by version {plan.version}"
        if plan.compute_capability != self._world.device.compute_capability:
            return f"made for compute capability {plan.compute_capability}"
        return None

    def _log(self, message: str) -> None:
        self._logger.log(Severity.ERROR, message)


class RuntimeOld(Runtime):
    _engine_type = ICudaEngineOld


class RuntimeRtx(Runtime):
    _engine_type = ICudaEngineRtx

    def get_engine_validity(self, buffer: NDArray[np.uint8]) -> tuple[EngineValidity, int]:
        plan = _decoded(buffer)
        if plan is None:
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        if self._problem(plan):
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.UNSUPPORTED_CC)
        return EngineValidity.VALID, 0


def fake_library(
    device: FakeDevice,
    flavour: Flavour = "tensorrt_rtx",
    version: str = VERSION,
    *,
    is_old: bool = False,
) -> tuple[Library, World]:
    """A flavour whose engines run on the fake device, and what its objects share."""
    world = World(device, version)
    runtime_type: type[Runtime] = RuntimeOld if is_old else Runtime
    if flavour == "tensorrt_rtx":
        runtime_type = RuntimeRtx
    module = SimpleNamespace(
        ILogger=ILogger,
        Runtime=lambda logger: runtime_type(world, logger),
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
    )
    if flavour == "tensorrt_rtx":
        module.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
        module.EngineValidity = EngineValidity
        module.EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
    return Library(flavour, version, module), world


def _decoded(buffer: object) -> PlanText | None:
    try:
        plan = msgspec.json.decode(bytes(memoryview(buffer)), type=PlanText)  # type: ignore[arg-type]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return plan if plan.magic == MAGIC else None


def _compile(world: World, config: IRuntimeConfig, plan: PlanText) -> None:
    entry = Path(plan.graph).as_posix().encode()
    cache = config._cache if isinstance(config, IRuntimeConfigRtx) else None
    if cache is None or entry not in cache._entries:
        world.compiled.append(plan.graph)
    if cache is not None:
        cache._entries.add(entry)
