"""The fake TensorRT refuses calls that break its rules: each is broken once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.engine.tensorrt.add_engine import SHAPE, USER_MANAGED, AddEngine
from tests.fakes.cuda import FakeDevice, Operation, RuleBroken


def test_an_engine_that_keeps_all_rules_runs_when_somebody_waits(engine: AddEngine) -> None:
    context = engine.ready()
    for name, value in (("a", 1.0), ("b", 2.0)):
        engine.stream.copy_in(engine.memories[name].pointer, np.full(SHAPE, value, np.float32))
    assert context.execute_async_v3(engine.stream.handle)
    pointer = engine.memories["y"].pointer
    assert np.isnan(engine.device.bytes_at(pointer, 24).view(np.float32)).all()  # not yet
    made = np.empty(SHAPE, np.float32)
    engine.stream.copy_out(made, pointer)
    assert (made == 3).all()


def test_the_default_stream_is_refused(engine: AddEngine) -> None:
    with pytest.raises(RuleBroken, match="a default stream, or none that lives"):
        engine.ready().execute_async_v3(0)


def test_a_stream_that_was_freed_is_refused(engine: AddEngine) -> None:
    context, handle = engine.ready(), engine.stream.handle
    engine.stream.close()
    with pytest.raises(RuleBroken, match="a default stream, or none that lives"):
        context.execute_async_v3(handle)


def test_every_address_has_to_be_set(engine: AddEngine) -> None:
    context = engine.context()
    engine.give_block(context)
    with pytest.raises(RuleBroken, match=r"no address was set for \['a', 'b', 'y'\]"):
        context.execute_async_v3(engine.stream.handle)


def test_addresses_are_aligned(engine: AddEngine) -> None:
    with pytest.raises(RuleBroken, match="which is not aligned"):
        engine.ready().set_tensor_address("a", engine.memories["a"].pointer + 4)


def test_addresses_lie_in_live_memory_that_is_large_enough(engine: AddEngine) -> None:
    context = engine.ready()
    context.set_tensor_address("a", engine.device.allocate(20).pointer)
    with pytest.raises(RuleBroken, match=r"24 bytes at .* are in no live allocation"):
        context.execute_async_v3(engine.stream.handle)


def test_an_address_of_nothing_is_refused(engine: AddEngine) -> None:
    context = engine.ready()
    context.set_tensor_address("a", 0)
    with pytest.raises(RuleBroken, match="in no live allocation"):
        context.execute_async_v3(engine.stream.handle)


def test_one_tensor_is_not_read_and_written_by_one_call(engine: AddEngine) -> None:
    context = engine.ready()
    context.set_tensor_address("y", engine.memories["a"].pointer)
    with pytest.raises(RuleBroken, match="read and written by one call"):
        context.execute_async_v3(engine.stream.handle)


def test_shapes_lie_in_the_profile(engine: AddEngine) -> None:
    assert not engine.context().set_input_shape("a", (5, 3))
    assert engine.logged == ["a of shape (5, 3) is outside the profile"]


def test_there_has_to_be_memory_for_activations(engine: AddEngine) -> None:
    context = engine.context()
    for name in ("a", "b", "y"):
        engine.memories[name] = engine.device.allocate(24)
        context.set_tensor_address(name, engine.memories[name].pointer)
    with pytest.raises(RuleBroken, match="there is no memory for activations"):
        context.execute_async_v3(engine.stream.handle)


@pytest.mark.parametrize(("shift", "less"), [(4, 0), (0, 1)])
def test_memory_for_activations_is_aligned_and_large_enough(
    engine: AddEngine, shift: int, less: int
) -> None:
    context = engine.ready()
    needed = context.update_device_memory_size_for_shapes()
    memory = engine.device.allocate(needed + 256)
    context.set_device_memory(memory.pointer + shift, needed - less)
    with pytest.raises(RuleBroken, match=r"the memory for activations, .*, is unfit"):
        context.execute_async_v3(engine.stream.handle)


def test_its_size_is_known_once_all_shapes_are_set(engine: AddEngine) -> None:
    config = engine.native.create_runtime_config()
    config.set_execution_context_allocation_strategy(USER_MANAGED)
    with pytest.raises(RuleBroken, match="before all shapes were set"):
        engine.native.create_execution_context(config).update_device_memory_size_for_shapes()


def test_contexts_are_user_managed(engine: AddEngine) -> None:
    with pytest.raises(RuleBroken, match="user-managed activation memory only"):
        engine.native.create_execution_context(engine.native.create_runtime_config())


def test_a_budget_is_set_before_there_are_contexts(tmp_path: Path) -> None:
    engine = AddEngine(tmp_path, streamable_bytes=100)
    with pytest.raises(RuleBroken, match="a budget of -1 bytes"):
        engine.native.weight_streaming_budget_v2 = -1
    context = engine.ready()
    with pytest.raises(RuleBroken, match="while there are contexts"):
        engine.native.weight_streaming_budget_v2 = 0
    del context


def test_code_of_a_plan_is_never_allowed(engine: AddEngine) -> None:
    engine.runtime.engine_host_code_allowed = False
    with pytest.raises(RuleBroken, match="code that runs on the host"):
        engine.runtime.engine_host_code_allowed = True


def test_work_of_another_stream_runs_only_as_far_as_an_event() -> None:
    device, done = FakeDevice(), []
    one, other = device.stream(), device.stream()
    one.enqueue(Operation(lambda: done.append(1)))
    event = one.record()
    one.enqueue(Operation(lambda: done.append(2)))
    other.wait_for(event)
    other.synchronize()
    assert done == [1]
