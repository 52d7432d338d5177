"""An engine that adds on the fake TensorRT, and what it needs for a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper

from meancache_trt.engine.tensorrt.record import ShapeRange
from tests.fakes.cuda import FakeDevice, FakeMemory
from tests.fakes.tensorrt import fake_library
from tests.fakes.tensorrt_base import (
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
    PlanText,
)

SHAPE = (2, 3)
USER_MANAGED = ExecutionContextAllocationStrategy.USER_MANAGED


class AddEngine:
    """y = a + b on the fake, made ready step by step as the runtime does it."""

    def __init__(self, directory: Path, **plan: Any) -> None:
        self.device = FakeDevice()
        library, self.world = fake_library(self.device)
        self.logged: list[str] = []
        logger = library.module.ILogger()
        logger.log = lambda _, message: self.logged.append(message)
        self.runtime = library.module.Runtime(logger)
        held = ShapeRange((1, 3), (2, 3), (4, 3))
        profile = {"a": held, "b": held}
        graph = str(_add_graph(directory / "add.onnx"))
        text = PlanText(graph, library.version, self.device.compute_capability, profile, **plan)
        self.native = self.runtime.deserialize_cuda_engine(_bytes(text))
        self.stream = self.device.stream()
        self.memories: dict[str, FakeMemory] = {}

    def context(self, specialization: str = "EAGER") -> Any:
        config = self.native.create_runtime_config()
        config.set_execution_context_allocation_strategy(USER_MANAGED)
        strategies = DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies[specialization]
        made = self.native.create_execution_context(config)
        for name in ("a", "b"):
            made.set_input_shape(name, SHAPE)
        return made

    def ready(self, **options: Any) -> Any:
        made = self.context(**options)
        for name in ("a", "b", "y"):
            self.memories[name] = self.device.allocate(24)
            made.set_tensor_address(name, self.memories[name].pointer)
        self.give_block(made)
        return made

    def give_block(self, context: Any) -> None:
        needed = context.update_device_memory_size_for_shapes()
        memory = self.memories["block"] = self.device.allocate(needed)
        context.set_device_memory(memory.pointer, needed)


def _add_graph(path: Path) -> Path:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "aby"
    ]
    add = helper.make_node("Add", ["a", "b"], ["y"])
    graph = helper.make_graph([add], "add", values[:2], values[2:])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def _bytes(plan: PlanText) -> np.ndarray:
    return np.frombuffer(msgspec.json.encode(plan), np.uint8)
