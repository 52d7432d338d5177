"""Modules whose weights are in memory only while they run: two blocks of FLUX.2 would take 9 GB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from meancache_trt.export.safetensors_file import StoredTensor
from meancache_trt.export.weights import load_tensors


def stream_weights(network: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Have every module of `network` read its own tensors, in float32, each time that it runs.

    Before and after they are on the meta device. `stored` has them by the network's names.
    """
    for prefix, module in network.named_modules():
        tensors = (
            *module.named_parameters(prefix, recurse=False),
            *module.named_buffers(prefix, recurse=False),
        )
        own = {name.rpartition(".")[2]: stored[name] for name, _ in tensors if name in stored}
        if own:
            weights = _Weights(own)
            module.register_forward_pre_hook(weights.read)
            module.register_forward_hook(weights.forget, always_call=True)


@dataclass(frozen=True)
class _Weights:
    """A module's own tensors: parameters, and buffers that checkpoints store."""

    stored: Mapping[str, StoredTensor]

    def read(self, module: nn.Module, _: Any) -> None:
        for name, tensor in load_tensors(self.stored).items():
            _put(module, name, tensor)

    def forget(self, module: nn.Module, *_: Any) -> None:
        for name in self.stored:
            _put(module, name, getattr(module, name).to("meta"))


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    is_buffer = name in dict(module.named_buffers(recurse=False))
    setattr(module, name, tensor if is_buffer else nn.Parameter(tensor, requires_grad=False))
