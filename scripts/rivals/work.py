"""How much of the network ran: floating-point operations of the transformer's matrix products.

A block cache calls the transformer at every step and runs a part of it, so calls say nothing. What
is counted is every matrix product that is executed while the transformer runs, whoever calls it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor
Count = Callable[..., int]


def _linear(_result: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:  # noqa: A002
    return 2 * input.numel() * weight.shape[0]


def _convolution(result: Tensor, _input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * result.numel() * weight[0].numel()


def _product(result: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    return 2 * result.numel() * left.shape[-1]


def _attention(
    _result: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    """Scores and their product with the values; a mask saves nothing."""
    queries = query.shape[:-1].numel()
    return 2 * queries * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_COUNTS: dict[Callable[..., Any], Count] = {
    functional.linear: _linear,
    functional.conv2d: _convolution,
    functional.conv3d: _convolution,
    functional.scaled_dot_product_attention: _attention,
    torch.matmul: _product,
    torch.Tensor.matmul: _product,
    torch.Tensor.__matmul__: _product,
    torch.bmm: _product,
}


class FlopCounter(TorchFunctionMode):
    """Counts multiplications and additions of matrix products, whichever module asks for them.

    Element-wise work is left out, also what a cache itself does with it; time shows that.
    `torch.utils.flop_counter` counts the same in a run that takes three times as long; the tests
    compare the two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` and count it."""
        named = kwargs or {}
        result = func(*args, **named)
        if func in _COUNTS:
            self.flops += _COUNTS[func](result, *args, **named)
        return result


class TransformerProbe:
    """What the transformer of a pipeline does during one call of the pipeline.

    `calls` counts its calls and `flops` what they execute. The clock starts with the first call and
    `mark` stops it, so that text encoding and decoding are not in `seconds`.
    """

    def __init__(self, *, is_counting: bool) -> None:
        self.calls, self.seconds = 0, 0.0
        self._counter = FlopCounter() if is_counting else contextlib.nullcontext()
        self._started: float | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations so far; 0 where it does not count."""
        return self._counter.flops if isinstance(self._counter, FlopCounter) else 0

    def mark(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:  # noqa: ARG002
        """A diffusers `callback_on_step_end`: the loop is done so far."""
        assert self._started is not None
        self.seconds = time.perf_counter() - self._started
        return tensors

    def _begin(self, *_: Any) -> None:
        if self._started is None:
            self._started = time.perf_counter()
        self.calls += 1
        self._counter.__enter__()

    def _end(self, *_: Any) -> None:
        self._counter.__exit__(None, None, None)


@contextlib.contextmanager
def probing(transformer: torch.nn.Module, *, is_counting: bool) -> Iterator[TransformerProbe]:
    """Watch a transformer through its module hooks, which rivals that replace `forward` leave."""
    probe = TransformerProbe(is_counting=is_counting)
    handles = [
        transformer.register_forward_pre_hook(probe._begin),
        transformer.register_forward_hook(probe._end, always_call=True),
    ]
    try:
        yield probe
    finally:
        for handle in handles:
            handle.remove()
