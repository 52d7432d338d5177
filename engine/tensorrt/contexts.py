"""Execution contexts, and the memory for activations that those of one lane share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meancache_trt.engine.cuda.device import Device, Memory, Stream, aligned
from meancache_trt.engine.tensorrt.engines import Engine, Owned
from meancache_trt.engine.tensorrt.runtime_cache import RuntimeCache
from meancache_trt.errors import RenderError

Shapes = Mapping[str, tuple[int, ...]]


class ActivationBlock:
    """One block of device memory for all contexts of a lane, which never run at the same time.

    `generation` counts how often it moved: what was captured before holds an address that is gone.
    """

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._memory: Memory | None = None
        self.generation = 0

    @property
    def pointer(self) -> int:
        """Its address. Raises `RenderError` where the last growth failed."""
        if self._memory is None:
            raise RenderError("there is no memory for activations; open the pipeline again")
        return self._memory.pointer

    @property
    def size_bytes(self) -> int:
        return self._memory.size_bytes if self._memory else 0

    def reserve(self, size_bytes: int) -> None:
        """Make it at least so large. Waits for the lane where it has to grow."""
        wanted = aligned(size_bytes)
        if wanted <= self.size_bytes:
            return
        self._stream.synchronize()
        self._memory = None  # first, so that the two need not fit side by side
        self.generation += 1
        self._memory = self._device.allocate(wanted)


class Context(Owned):
    """An engine's execution context for one set of input shapes on one lane.

    Raises `RenderError` with TensorRT's words where it cannot be made, or does not take a shape.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        engine: Engine,
        block: ActivationBlock,
        *,
        shapes: Shapes,
        cache: RuntimeCache,
    ) -> None:
        device.activate()
        super().__init__(device, *_created(engine, cache))
        self.engine = engine
        self._device, self._stream, self._block = device, stream, block
        self._generation = 0
        self._addresses: dict[str, int] = {}
        for name, shape in shapes.items():
            if not self.native.set_input_shape(name, shape):
                raise self._refusal(f"does not take {name} of shape {shape}")
        # Zero is its word for a failure, and then the upper bound over the whole profile serves.
        needed = self.native.update_device_memory_size_for_shapes()
        block.reserve(needed or engine.native.device_memory_size_v2)

    @property
    def generation(self) -> int:
        """That of the block, which changes where its memory moves."""
        return self._block.generation

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input or output, given the shapes of all inputs."""
        return tuple(self.native.get_tensor_shape(name))

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Run on the lane's stream. Raises `RenderError` with TensorRT's words where it refuses."""
        native, block = self.native, self._block
        self._device.activate()
        if self._generation != block.generation:
            native.set_device_memory(block.pointer, block.size_bytes)
            self._generation = block.generation
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not native.set_tensor_address(name, address):
                    raise self._refusal(f"does not take the address of {name}")
                self._addresses[name] = address
        if not native.execute_async_v3(self._stream.handle):
            raise self._refusal("could not be started")

    def why_not_captured(self) -> str | None:
        """Why its work cannot become part of a CUDA graph; None where nothing speaks against it."""
        component = self.engine.record.key.component
        if self.engine.is_streaming:
            return f"the weights of {component} are streamed"
        native = self.native
        if hasattr(native, "is_stream_capturable") and not native.is_stream_capturable(
            self._stream.handle
        ):
            return f"TensorRT cannot capture {component}: {self.engine.log.reason()}"
        return None

    def _refusal(self, what: str) -> RenderError:
        key = self.engine.record.key
        return RenderError(
            f"{key.flavour} {key.version}: the engine of {key.component} {what}: "
            f"{self.engine.log.reason()}"
        )


def _created(engine: Engine, cache: RuntimeCache) -> list[Any]:
    """The native context, then what has to outlive it."""
    module, native = engine.module, engine.native
    user_managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
    if hasattr(native, "create_runtime_config"):
        config = native.create_runtime_config()
        config.set_execution_context_allocation_strategy(user_managed)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            # Compiled in the background, kernels would change after a capture (TensorRT for RTX).
            strategies = module.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        cache.attach(config)
        created = [native.create_execution_context(config), config]
    else:
        created = [native.create_execution_context(user_managed)]
    if created[0] is None:
        raise RenderError(
            f"TensorRT cannot make a context of {engine.record.key.component}: "
            f"{engine.log.reason()}; close other programs that use the GPU"
        )
    return created
