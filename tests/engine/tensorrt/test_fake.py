"""The fakes can fail: each rule is broken once. And they have no attribute that TensorRT lacks."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper

from meancache_trt.engine.tensorrt.record import ShapeRange
from tests.fakes import tensorrt as fakes
from tests.fakes.cuda import FakeDevice, FakeMemory, Operation, RuleBroken
from tests.fakes.tensorrt import PlanText, fake_library

SHAPE = (2, 3)
USER_MANAGED = fakes.ExecutionContextAllocationStrategy.USER_MANAGED


class Engine:
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
        strategies = fakes.DynamicShapesKernelSpecializationStrategy
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


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


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


def test_an_engine_that_keeps_all_rules_runs_when_somebody_waits(engine: Engine) -> None:
    context = engine.ready()
    for name, value in (("a", 1.0), ("b", 2.0)):
        engine.stream.copy_in(engine.memories[name].pointer, np.full(SHAPE, value, np.float32))
    assert context.execute_async_v3(engine.stream.handle)
    pointer = engine.memories["y"].pointer
    assert np.isnan(engine.device.bytes_at(pointer, 24).view(np.float32)).all()  # not yet
    made = np.empty(SHAPE, np.float32)
    engine.stream.copy_out(made, pointer)
    assert (made == 3).all()


def test_the_default_stream_is_refused(engine: Engine) -> None:
    with pytest.raises(RuleBroken, match="a default stream, or none that lives"):
        engine.ready().execute_async_v3(0)


def test_a_stream_that_was_freed_is_refused(engine: Engine) -> None:
    context, handle = engine.ready(), engine.stream.handle
    engine.stream.close()
    with pytest.raises(RuleBroken, match="a default stream, or none that lives"):
        context.execute_async_v3(handle)


def test_every_address_has_to_be_set(engine: Engine) -> None:
    context = engine.context()
    engine.give_block(context)
    with pytest.raises(RuleBroken, match=r"no address was set for \['a', 'b', 'y'\]"):
        context.execute_async_v3(engine.stream.handle)


def test_addresses_are_aligned(engine: Engine) -> None:
    with pytest.raises(RuleBroken, match="which is not aligned"):
        engine.ready().set_tensor_address("a", engine.memories["a"].pointer + 4)


def test_addresses_lie_in_live_memory_that_is_large_enough(engine: Engine) -> None:
    context = engine.ready()
    context.set_tensor_address("a", engine.device.allocate(20).pointer)
    with pytest.raises(RuleBroken, match=r"24 bytes at .* are in no live allocation"):
        context.execute_async_v3(engine.stream.handle)


def test_an_address_of_nothing_is_refused(engine: Engine) -> None:
    context = engine.ready()
    context.set_tensor_address("a", 0)
    with pytest.raises(RuleBroken, match="in no live allocation"):
        context.execute_async_v3(engine.stream.handle)


def test_one_tensor_is_not_read_and_written_by_one_call(engine: Engine) -> None:
    context = engine.ready()
    context.set_tensor_address("y", engine.memories["a"].pointer)
    with pytest.raises(RuleBroken, match="read and written by one call"):
        context.execute_async_v3(engine.stream.handle)


def test_shapes_lie_in_the_profile(engine: Engine) -> None:
    assert not engine.context().set_input_shape("a", (5, 3))
    assert engine.logged == ["a of shape (5, 3) is outside the profile"]


def test_there_has_to_be_memory_for_activations(engine: Engine) -> None:
    context = engine.context()
    for name in ("a", "b", "y"):
        engine.memories[name] = engine.device.allocate(24)
        context.set_tensor_address(name, engine.memories[name].pointer)
    with pytest.raises(RuleBroken, match="there is no memory for activations"):
        context.execute_async_v3(engine.stream.handle)


@pytest.mark.parametrize(("shift", "less"), [(4, 0), (0, 1)])
def test_memory_for_activations_is_aligned_and_large_enough(
    engine: Engine, shift: int, less: int
) -> None:
    context = engine.ready()
    needed = context.update_device_memory_size_for_shapes()
    memory = engine.device.allocate(needed + 256)
    context.set_device_memory(memory.pointer + shift, needed - less)
    with pytest.raises(RuleBroken, match=r"the memory for activations, .*, is unfit"):
        context.execute_async_v3(engine.stream.handle)


def test_its_size_is_known_once_all_shapes_are_set(engine: Engine) -> None:
    config = engine.native.create_runtime_config()
    config.set_execution_context_allocation_strategy(USER_MANAGED)
    with pytest.raises(RuleBroken, match="before all shapes were set"):
        engine.native.create_execution_context(config).update_device_memory_size_for_shapes()


def test_contexts_are_user_managed(engine: Engine) -> None:
    with pytest.raises(RuleBroken, match="user-managed activation memory only"):
        engine.native.create_execution_context(engine.native.create_runtime_config())


def test_activations_that_were_freed_are_found_when_the_work_runs(engine: Engine) -> None:
    context = engine.ready()
    context.execute_async_v3(engine.stream.handle)
    del engine.memories["block"]
    gc.collect()
    engine.device._discarded.pop()()  # freed without waiting
    with pytest.raises(RuleBroken, match="whose memory for activations is gone"):
        engine.stream.synchronize()


def test_a_capture_before_the_first_enqueue_is_refused(engine: Engine) -> None:
    context = engine.ready()
    with pytest.raises(RuleBroken, match="a capture before the first enqueue"):
        engine.stream.capture(lambda: context.execute_async_v3(engine.stream.handle))


def test_a_capture_after_a_change_of_shapes_is_refused(engine: Engine) -> None:
    context = engine.ready()
    context.execute_async_v3(engine.stream.handle)
    for name in ("a", "b"):
        context.set_input_shape(name, (1, 3))
    with pytest.raises(RuleBroken, match="first enqueue with these shapes"):
        engine.stream.capture(lambda: context.execute_async_v3(engine.stream.handle))


@pytest.mark.parametrize("plan", [{"is_capturable": False}, {"streamable_bytes": 1 << 20}])
def test_an_engine_that_cannot_be_captured_is_refused(tmp_path: Path, plan: dict[str, Any]) -> None:
    engine = Engine(tmp_path, **plan)
    engine.native.weight_streaming_budget_v2 = 0
    context = engine.ready()
    context.execute_async_v3(engine.stream.handle)
    with pytest.raises(RuleBroken, match="this engine cannot be captured"):
        engine.stream.capture(lambda: context.execute_async_v3(engine.stream.handle))


def test_kernels_that_are_specialised_later_are_not_capturable(engine: Engine) -> None:
    assert engine.ready().is_stream_capturable(engine.stream.handle)
    assert not engine.ready(specialization="LAZY").is_stream_capturable(engine.stream.handle)


@pytest.mark.parametrize(
    "action",
    [
        lambda engine: engine.device.allocate(1),
        lambda engine: engine.stream.synchronize(),
        lambda engine: engine.stream.copy_out(np.zeros(1), 0),
        lambda engine: engine.device.stream().copy_in(0, np.zeros(1)),
        lambda engine: engine.stream.record(),
        lambda engine: engine.stream.capture(lambda: None),
        lambda engine: engine.context(),
    ],
)
def test_nothing_is_allocated_copied_or_waited_for_in_a_capture(
    engine: Engine, action: Any
) -> None:
    with pytest.raises(RuleBroken, match="while a capture is under way"):
        engine.stream.capture(lambda: action(engine))


def test_a_context_that_goes_in_a_capture_is_a_violation(engine: Engine) -> None:
    contexts = [engine.ready()]
    engine.stream.capture(contexts.clear)
    assert engine.device.violations == ["a context ended while a capture is under way"]


def test_memory_freed_in_a_capture_is_a_violation(engine: Engine) -> None:
    memory = engine.device.allocate(1)
    engine.stream.capture(lambda: engine.device.release(memory._block))
    assert engine.device.violations == ["memory was freed while a capture was under way"]


def test_a_graph_replays_the_addresses_of_its_capture(engine: Engine) -> None:
    context = engine.ready()
    context.execute_async_v3(engine.stream.handle)
    graph = engine.stream.capture(lambda: context.execute_async_v3(engine.stream.handle))
    captured = engine.memories["y"]
    engine.memories["y"] = engine.device.allocate(24)
    context.set_tensor_address("y", engine.memories["y"].pointer)
    for name in ("a", "b"):
        engine.stream.fill_zeros(engine.memories[name].pointer, 24)
    graph.launch()
    made = np.empty(SHAPE, np.float32)
    engine.stream.copy_out(made, captured.pointer)
    assert (made == 0).all()
    engine.stream.copy_out(made, engine.memories["y"].pointer)
    assert np.isnan(made).all()


@pytest.mark.parametrize("what", ["y", "block"])
def test_a_graph_whose_memory_is_gone_is_found(engine: Engine, what: str) -> None:
    context = engine.ready()
    context.execute_async_v3(engine.stream.handle)
    graph = engine.stream.capture(lambda: context.execute_async_v3(engine.stream.handle))
    del engine.memories[what]
    gc.collect()
    engine.device.collect()
    graph.launch()
    with pytest.raises(RuleBroken, match=r"no live allocation|memory for activations is gone"):
        engine.stream.synchronize()


def test_a_graph_whose_context_is_gone_is_found(engine: Engine) -> None:
    contexts = [engine.ready()]
    contexts[0].execute_async_v3(engine.stream.handle)
    graph = engine.stream.capture(lambda: contexts[0].execute_async_v3(engine.stream.handle))
    engine.stream.synchronize()
    contexts.clear()
    gc.collect()
    graph.launch()
    with pytest.raises(RuleBroken, match="whose context or engine is gone"):
        engine.stream.synchronize()


def test_a_closed_graph_is_not_launched_and_not_closed_again(engine: Engine) -> None:
    graph = engine.stream.capture(lambda: None)
    graph.close()
    for use in (graph.launch, graph.close):
        with pytest.raises(RuleBroken, match="closed"):
            use()


def test_an_engine_that_goes_before_its_contexts_is_a_violation(engine: Engine) -> None:
    context = engine.ready()
    engine.native = None
    gc.collect()
    assert engine.device.violations == ["a engine ended before what uses it"]
    del context


def test_a_runtime_that_goes_before_its_engines_is_a_violation(engine: Engine) -> None:
    engine.runtime = None
    gc.collect()
    assert engine.device.violations == ["a runtime ended before what uses it"]


def test_what_outlives_the_device_is_a_violation(engine: Engine) -> None:
    engine.device.close()
    engine.native = None
    gc.collect()
    assert engine.device.violations == ["a engine ended after its device"]


def test_a_budget_is_set_before_there_are_contexts(tmp_path: Path) -> None:
    engine = Engine(tmp_path, streamable_bytes=100)
    with pytest.raises(RuleBroken, match="a budget of -1 bytes"):
        engine.native.weight_streaming_budget_v2 = -1
    context = engine.ready()
    with pytest.raises(RuleBroken, match="while there are contexts"):
        engine.native.weight_streaming_budget_v2 = 0
    del context


def test_code_of_a_plan_is_never_allowed(engine: Engine) -> None:
    engine.runtime.engine_host_code_allowed = False
    with pytest.raises(RuleBroken, match="code that runs on the host"):
        engine.runtime.engine_host_code_allowed = True


def test_a_closed_device_is_refused() -> None:
    device = FakeDevice()
    device.close()
    for use in (lambda: device.allocate(1), device.stream, device.activate):
        with pytest.raises(RuleBroken, match="a closed device"):
            use()


def test_work_of_another_stream_runs_only_as_far_as_an_event() -> None:
    device, done = FakeDevice(), []
    one, other = device.stream(), device.stream()
    one.enqueue(Operation(lambda: done.append(1)))
    event = one.record()
    one.enqueue(Operation(lambda: done.append(2)))
    other.wait_for(event)
    other.synchronize()
    assert done == [1]


@pytest.mark.parametrize(
    "thing",
    [lambda engine: engine.runtime, lambda engine: engine.native, lambda e: e.context()],
)
def test_an_attribute_that_nobody_uses_is_not_there(engine: Engine, thing: Any) -> None:
    with pytest.raises(AttributeError):
        _ = thing(engine).name
    with pytest.raises(AttributeError):
        thing(engine).name = "a name"


PAIRS = [
    (fakes.ILogger, tensorrt_rtx.ILogger),
    (fakes.RuntimeRtx, tensorrt_rtx.Runtime),
    (fakes.ICudaEngineRtx, tensorrt_rtx.ICudaEngine),
    (fakes.IExecutionContextRtx, tensorrt_rtx.IExecutionContext),
    (fakes.IRuntimeConfigRtx, tensorrt_rtx.IRuntimeConfig),
    (fakes.IRuntimeCache, tensorrt_rtx.IRuntimeCache),
]


@pytest.mark.parametrize(("fake", "real"), PAIRS, ids=lambda kind: kind.__name__)
def test_the_library_has_every_attribute_of_the_fake(fake: type, real: type) -> None:
    names = [name for name in dir(fake) if not name.startswith("_")]
    assert names
    assert not [name for name in names if not hasattr(real, name)]
    for name in names:  # what is called in the one is called in the other
        assert callable(getattr(fake, name)) == callable(getattr(real, name)), name


@pytest.mark.parametrize(
    "name",
    [
        "DataType",
        "TensorIOMode",
        "TensorLocation",
        "ExecutionContextAllocationStrategy",
        "DynamicShapesKernelSpecializationStrategy",
        "EngineValidity",
        "EngineInvalidityDiagnostics",
    ],
)
def test_the_library_has_every_member_of_the_fakes_enums(name: str) -> None:
    real = getattr(tensorrt_rtx, name).__members__
    assert getattr(fakes, name).__members__.keys() <= real.keys()


def test_the_fakes_module_has_what_the_library_has() -> None:
    library, _ = fake_library(FakeDevice())
    assert not [name for name in vars(library.module) if not hasattr(tensorrt_rtx, name)]
