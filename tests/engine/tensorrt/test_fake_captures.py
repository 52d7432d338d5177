"""The fake TensorRT refuses captures that CUDA would: each rule is broken once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.tensorrt.add_engine import SHAPE, AddEngine
from tests.fakes.cuda import RuleBroken


def test_a_capture_before_the_first_enqueue_is_refused(engine: AddEngine) -> None:
    context = engine.ready()
    with pytest.raises(RuleBroken, match="a capture before the first enqueue"):
        engine.stream.capture(lambda: context.execute_async_v3(engine.stream.handle))


def test_a_capture_after_a_change_of_shapes_is_refused(engine: AddEngine) -> None:
    context = engine.ready()
    context.execute_async_v3(engine.stream.handle)
    for name in ("a", "b"):
        context.set_input_shape(name, (1, 3))
    with pytest.raises(RuleBroken, match="first enqueue with these shapes"):
        engine.stream.capture(lambda: context.execute_async_v3(engine.stream.handle))


@pytest.mark.parametrize("plan", [{"is_capturable": False}, {"streamable_bytes": 1 << 20}])
def test_an_engine_that_cannot_be_captured_is_refused(tmp_path: Path, plan: dict[str, Any]) -> None:
    engine = AddEngine(tmp_path, **plan)
    engine.native.weight_streaming_budget_v2 = 0
    context = engine.ready()
    context.execute_async_v3(engine.stream.handle)
    with pytest.raises(RuleBroken, match="this engine cannot be captured"):
        engine.stream.capture(lambda: context.execute_async_v3(engine.stream.handle))


def test_kernels_that_are_specialised_later_are_not_capturable(engine: AddEngine) -> None:
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
    engine: AddEngine, action: Any
) -> None:
    with pytest.raises(RuleBroken, match="while a capture is under way"):
        engine.stream.capture(lambda: action(engine))


def test_a_graph_replays_the_addresses_of_its_capture(engine: AddEngine) -> None:
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
