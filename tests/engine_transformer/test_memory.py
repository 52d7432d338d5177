"""What EngineTransformer copies, keeps and hands to its runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meancache_trt.bundle import Bundle
from meancache_trt.engine.onnxruntime import HostTensor, OnnxRuntime
from meancache_trt.engine_transformer import EngineTransformer
from meancache_trt.export import flux_torch
from meancache_trt.meancache.runtime import Graph, TensorSpec
from tests.engine_transformer.subjects import (
    Subject,
    flux_call,
)
from tests.numpy_runtime import Arrays, FunctionGraph, NumpyRuntime


class Watched(OnnxRuntime):
    """ONNX Runtime that remembers the addresses of the foreign memory that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[tuple[int, int]] = []

    def from_dlpack(self, value: Any) -> HostTensor:
        tensor = super().from_dlpack(value)
        self.addresses.append((value.data_ptr(), tensor.array.ctypes.data))
        return tensor


def test_nothing_is_copied_on_its_way_in_or_out(flux: Subject) -> None:
    runtime = Watched()
    engine = EngineTransformer(flux.bundle, runtime=runtime)
    call = flux_call(1, 3, 4, 5)
    velocity = engine(**call).sample
    assert all(theirs == bound for theirs, bound in runtime.addresses)
    bound = {address for _, address in runtime.addresses}
    assert len(bound) == len(flux.bundle.export.components["transformer"].inputs) + 1
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"):
        assert call[name].data_ptr() in bound, name
    assert velocity.data_ptr() == runtime.addresses[-1][1]


def test_velocities_of_two_calls_are_apart(flux: Subject) -> None:
    engine = flux.engine()
    first = engine(**flux_call(1, 3, 4, 5)).sample
    before = first.clone()
    second = engine(**{**flux_call(1, 3, 4, 5), "guidance": torch.tensor([1.0])}).sample
    assert torch.equal(first, before)
    assert not torch.equal(first, second)


def test_inputs_are_left_as_they_were(flux: Subject) -> None:
    call = flux_call(2, 3, 4, 5)
    before = {name: value.clone() for name, value in call.items()}
    flux.engine()(**call)
    assert all(torch.equal(call[name], value) for name, value in before.items())


def test_memory_that_is_not_contiguous_is_copied(flux: Subject) -> None:
    call = flux_call(2, 3, 4, 5)
    strided = {**call, "hidden_states": call["hidden_states"].mT.contiguous().mT}
    assert not strided["hidden_states"].is_contiguous()
    engine = flux.engine()
    assert torch.equal(engine(**strided).sample, engine(**call).sample)


def test_tables_are_made_once_for_equal_ids(flux: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = flux_torch.position_tables

    def counted(*arguments: Any) -> Any:
        made.append(len(arguments[1]))
        return original(*arguments)

    monkeypatch.setattr(flux_torch, "position_tables", counted)
    engine, call = flux.engine(), flux_call(1, 3, 4, 5)
    short = flux_call(1, 3, 4, 2)
    for _ in range(3):
        engine(**{**call, "img_ids": call["img_ids"].clone()})
        engine(**short)  # as a negative prompt of another length
    assert made == [12, 12]
    before = engine(**call).sample
    call["img_ids"] += 1  # the same memory, other ids
    after = engine(**call).sample
    assert made == [12, 12, 12]
    assert not torch.equal(before, after)


class Doubling(NumpyRuntime):
    """A runtime whose only graph gives 2 x latent + timestep, to show that any runtime serves."""

    def __init__(self, bundle: Bundle) -> None:
        self._component = bundle.export.components["transformer"]
        self.fed: Arrays = {}

    def load(self, path: Path, *, is_light: bool = False) -> Graph:
        assert path.is_file()
        assert not is_light
        specs = [
            {name: TensorSpec(name, record.dtype, record.shape) for name, record in part.items()}
            for part in (self._component.inputs, self._component.outputs)
        ]
        return FunctionGraph(self._run, *specs)

    def _run(self, feed: Arrays) -> Arrays:
        self.fed = feed
        return {"velocity": 2 * feed["hidden_states"] + feed["timestep"][:, None, None]}


def test_any_runtime_executes_it_and_stays_its_owners(flux: Subject) -> None:
    runtime = Doubling(flux.bundle)
    call = flux_call(2, 3, 4, 5)
    with EngineTransformer(flux.bundle, runtime=runtime) as engine:
        found = engine(**call).sample
    assert torch.equal(found, 2 * call["hidden_states"] + call["timestep"][:, None, None])
    assert runtime.fed["image_rope"].shape == (12, 64)
