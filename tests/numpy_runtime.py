"""A runtime whose graphs are Python functions over NumPy arrays.

It implements `meancache_trt.meancache.runtime.Runtime` strictly (names, shapes and dtypes are
checked at every bind), so that tests of the loop need no backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.runtime import Call, Graph, Tensor, TensorSpec

Arrays = dict[str, NDArray[Any]]


class ArrayTensor:
    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return str(self.array.dtype)

    def write(self, value: NDArray[Any]) -> None:
        assert value.shape == self.shape
        assert value.dtype == self.array.dtype
        self.array[...] = value

    def read(self) -> NDArray[Any]:
        return self.array.copy()

    def view(self, shape: tuple[int, ...]) -> ArrayTensor:
        return ArrayTensor(self.array.reshape(shape))


@dataclass
class FunctionGraph:
    function: Callable[[Arrays], Arrays]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def bind(self, tensors: Mapping[str, Tensor]) -> Call:
        assert tensors.keys() == {*self.inputs, *self.outputs}
        arrays = {}
        for name, tensor in tensors.items():
            assert isinstance(tensor, ArrayTensor)
            arrays[name] = tensor.array
        read = [arrays[name] for name in self.inputs]
        written = [arrays[name] for name in self.outputs]
        assert not any(np.shares_memory(a, b) for a in read for b in written)
        return FunctionCall(self, arrays)


@dataclass
class FunctionCall:
    graph: FunctionGraph
    arrays: Arrays

    def enqueue(self) -> None:
        results = self.graph.function({name: self.arrays[name] for name in self.graph.inputs})
        for name, value in results.items():
            self.arrays[name][...] = value


@dataclass
class CallSequence:
    calls: Sequence[Call]

    def enqueue(self) -> None:
        for call in self.calls:
            call.enqueue()


class NumpyRuntime:
    name = "numpy"
    device = "cpu"
    precisions = ("float32",)
    version = np.__version__

    def load(self, path: Path, *, is_light: bool = False) -> Graph:
        raise AssertionError(f"this runtime loads nothing, asked for {path}, {is_light}")

    def zeros(self, shape: Sequence[int], dtype: str) -> ArrayTensor:
        return ArrayTensor(np.zeros(tuple(shape), dtype))

    def tensor(self, value: NDArray[Any]) -> ArrayTensor:
        return ArrayTensor(np.array(value))

    def from_dlpack(self, value: Any) -> ArrayTensor:
        array = np.from_dlpack(value)
        assert array.flags.c_contiguous
        return ArrayTensor(array)

    def sequence(self, calls: Sequence[Call]) -> Call:
        return CallSequence(calls)

    def synchronize(self) -> None:
        pass

    def lane(self) -> NumpyRuntime:
        return self

    def turn(self) -> AbstractContextManager[object]:
        return nullcontext()

    def free_bytes(self) -> int:
        return 1 << 40

    def __enter__(self) -> NumpyRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def specs(**tensors: tuple[str, tuple[int | str, ...]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items()}


def network_graph(velocity: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]) -> FunctionGraph:
    """A network `velocity(latent, timestep)` whose latent is (batch, tokens, channels)."""
    latent: tuple[int | str, ...] = ("batch", "tokens", "channels")
    return FunctionGraph(
        lambda feed: {"velocity": velocity(feed["hidden_states"], feed["timestep"])},
        specs(hidden_states=("float32", latent), timestep=("float32", ("batch",))),
        specs(velocity=("float32", latent)),
    )


def guiding_update_graph(history: int) -> FunctionGraph:
    """`update_graph` under classifier-free guidance, with the next model input as an output."""
    plain = update_graph(history)
    latent: tuple[int | str, ...] = ("batch", "tokens", "channels")
    twice: tuple[int | str, ...] = ("two_batch", "tokens", "channels")

    def update(feed: Arrays) -> Arrays:
        conditional, unconditional = np.split(feed["model_output"], 2)
        scale = feed["guidance_scale"][:, None, None]
        guided = unconditional + scale * (conditional - unconditional)
        made = plain.function({**feed, "model_output": guided})
        return {**made, "model_input": np.concatenate([made["next_latent"]] * 2)}

    changed = specs(model_output=("float32", twice), guidance_scale=("float32", ("batch",)))
    given = specs(model_input=("float32", twice), velocity=("float32", latent))
    return FunctionGraph(update, {**plain.inputs, **changed}, {**plain.outputs, **given})


def update_graph(history: int) -> FunctionGraph:
    """next_latent = latent + Σ weights[j] · v_j, in float32 and in order of age."""
    latent: tuple[int | str, ...] = ("batch", "tokens", "channels")
    past = {f"history_{age}": ("float32", latent) for age in range(1, history)}

    def update(feed: Arrays) -> Arrays:
        velocities = [feed["model_output"], *(feed[name] for name in past)]
        moved = feed["latent"]
        for weight, velocity in zip(feed["weights"], velocities, strict=True):
            moved = moved + weight * velocity
        return {"next_latent": moved, "velocity": feed["model_output"]}

    inputs = specs(
        latent=("float32", latent),
        model_output=("float32", latent),
        weights=("float32", (history,)),
        **past,
    )
    return FunctionGraph(
        update, inputs, specs(next_latent=("float32", latent), velocity=("float32", latent))
    )
