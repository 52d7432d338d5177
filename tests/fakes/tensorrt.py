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
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.engine.tensorrt.library import Flavour, Library
from meancache_trt.engine.tensorrt.record import Shape
from tests.fakes.cuda import FakeDevice, RuleBroken
from tests.fakes.tensorrt_base import (
    VERSION,
    DataType,
    DynamicShapesKernelSpecializationStrategy,
    EngineInvalidityDiagnostics,
    EngineValidity,
    ExecutionContextAllocationStrategy,
    ILogger,
    PlanText,
    Severity,
    Strict,
    TensorIOMode,
    TensorLocation,
    World,
    decoded,
)
from tests.fakes.tensorrt_context import (
    IExecutionContext,
    IExecutionContextRtx,
    IRuntimeConfig,
    IRuntimeConfigRtx,
)

_BYTES_PER_VALUE = 4
_FIXED_BYTES = 1000  # not a multiple of the alignment, on purpose

_DTYPES = {
    "float32": DataType.FLOAT,
    "int64": DataType.INT64,
    "int32": DataType.INT32,
    "bool": DataType.BOOL,
}


class ICudaEngine(Strict):
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


class Runtime(Strict):
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
        plan = decoded(serialized_engine)
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
        plan = decoded(buffer)
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
