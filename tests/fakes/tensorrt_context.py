"""Execution contexts of the fake TensorRT, how they are configured, and what they compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meancache_trt.engine.cuda.device import ALIGNMENT_BYTES
from meancache_trt.engine.onnxruntime import HostTensor
from meancache_trt.engine.tensorrt.record import Shape
from tests.fakes.cuda import Block, Operation, RuleBroken
from tests.fakes.tensorrt_base import (
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
    PlanText,
    Strict,
    World,
)

if TYPE_CHECKING:
    from tests.fakes.tensorrt import ICudaEngine

CACHE_MAGIC = b"fake cache\n"


class IRuntimeCache(Strict):
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


class IRuntimeConfig(Strict):
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


class IExecutionContext(Strict):
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


def _compile(world: World, config: IRuntimeConfig, plan: PlanText) -> None:
    entry = Path(plan.graph).as_posix().encode()
    cache = config._cache if isinstance(config, IRuntimeConfigRtx) else None
    if cache is None or entry not in cache._entries:
        world.compiled.append(plan.graph)
    if cache is not None:
        cache._entries.add(entry)
