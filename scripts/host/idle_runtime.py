"""A runtime whose graphs do nothing, so that what remains of a loop is the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.loop import DenoisingLoop, Network
from meancache_trt.meancache.runtime import Call, Tensor, TensorSpec
from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import make_grid


class _Idle:
    """Call and graph at once."""

    def __init__(self, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
        self.inputs, self.outputs = inputs, outputs

    def bind(self, _tensors: Mapping[str, Tensor]) -> Call:
        return self

    def enqueue(self) -> None:
        pass


class _Sequence:
    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = tuple(calls)

    def enqueue(self) -> None:
        for call in self._calls:
            call.enqueue()


_NO_TURN = nullcontext()


class _Runtime:
    """As much of a runtime as a loop asks for."""

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        return np.zeros(tuple(shape), dtype)

    def tensor(self, value: NDArray[Any]) -> Any:
        return value

    def sequence(self, calls: Sequence[Call]) -> Call:
        return _Sequence(calls)

    def synchronize(self) -> None:
        pass

    def turn(self) -> AbstractContextManager[object]:
        return _NO_TURN


def idle_loop(evaluations: int) -> DenoisingLoop:
    """A loop over graphs that do nothing, every step evaluated."""
    update = _Idle({"weights": TensorSpec("weights", "float32", (1,))}, {})
    runtime: Any = _Runtime()
    return DenoisingLoop(
        runtime,
        {"transformer": Network(_Idle({}, {}), "x", "t", "v", 0.001)},
        update,
        schedule=bake("euler", make_grid(evaluations), range(evaluations)),
        latent_shape=(1, 64, 32),
        constants={},
    )
