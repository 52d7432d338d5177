"""The fakes find what is used after its end, or ended before its users."""

from __future__ import annotations

import gc

import pytest

from tests.engine.tensorrt.add_engine import AddEngine
from tests.fakes.cuda import FakeDevice, RuleBroken


def test_activations_that_were_freed_are_found_when_the_work_runs(engine: AddEngine) -> None:
    context = engine.ready()
    context.execute_async_v3(engine.stream.handle)
    del engine.memories["block"]
    gc.collect()
    engine.device._discarded.pop()()  # freed without waiting
    with pytest.raises(RuleBroken, match="whose memory for activations is gone"):
        engine.stream.synchronize()


def test_a_context_that_goes_in_a_capture_is_a_violation(engine: AddEngine) -> None:
    contexts = [engine.ready()]
    engine.stream.capture(contexts.clear)
    assert engine.device.violations == ["a context ended while a capture is under way"]


def test_memory_freed_in_a_capture_is_a_violation(engine: AddEngine) -> None:
    memory = engine.device.allocate(1)
    engine.stream.capture(lambda: engine.device.release(memory._block))
    assert engine.device.violations == ["memory was freed while a capture was under way"]


@pytest.mark.parametrize("what", ["y", "block"])
def test_a_graph_whose_memory_is_gone_is_found(engine: AddEngine, what: str) -> None:
    context = engine.ready()
    context.execute_async_v3(engine.stream.handle)
    graph = engine.stream.capture(lambda: context.execute_async_v3(engine.stream.handle))
    del engine.memories[what]
    gc.collect()
    engine.device.collect()
    graph.launch()
    with pytest.raises(RuleBroken, match=r"no live allocation|memory for activations is gone"):
        engine.stream.synchronize()


def test_a_graph_whose_context_is_gone_is_found(engine: AddEngine) -> None:
    contexts = [engine.ready()]
    contexts[0].execute_async_v3(engine.stream.handle)
    graph = engine.stream.capture(lambda: contexts[0].execute_async_v3(engine.stream.handle))
    engine.stream.synchronize()
    contexts.clear()
    gc.collect()
    graph.launch()
    with pytest.raises(RuleBroken, match="whose context or engine is gone"):
        engine.stream.synchronize()


def test_a_closed_graph_is_not_launched_and_not_closed_again(engine: AddEngine) -> None:
    graph = engine.stream.capture(lambda: None)
    graph.close()
    for use in (graph.launch, graph.close):
        with pytest.raises(RuleBroken, match="closed"):
            use()


def test_an_engine_that_goes_before_its_contexts_is_a_violation(engine: AddEngine) -> None:
    context = engine.ready()
    engine.native = None
    gc.collect()
    assert engine.device.violations == ["a engine ended before what uses it"]
    del context


def test_a_runtime_that_goes_before_its_engines_is_a_violation(engine: AddEngine) -> None:
    engine.runtime = None
    gc.collect()
    assert engine.device.violations == ["a runtime ended before what uses it"]


def test_what_outlives_the_device_is_a_violation(engine: AddEngine) -> None:
    engine.device.close()
    engine.native = None
    gc.collect()
    assert engine.device.violations == ["a engine ended after its device"]


def test_a_closed_device_is_refused() -> None:
    device = FakeDevice()
    device.close()
    for use in (lambda: device.allocate(1), device.stream, device.activate):
        with pytest.raises(RuleBroken, match="a closed device"):
            use()
