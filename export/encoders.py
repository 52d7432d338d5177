"""Text encoders of transformers: modules to trace without weights, and names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from meancache_trt.export.family import TextGraph
from meancache_trt.export.safetensors_file import StoredTensor


class EncoderModule(nn.Module):
    """Token ids to one field of what a text encoder returns, as diffusers calls it: no mask."""

    def __init__(self, network: nn.Module, field: str) -> None:
        super().__init__()
        self.network, self.field = network, field

    def forward(self, *, input_ids: Tensor) -> Tensor:
        features: Tensor = getattr(self.network(input_ids=input_ids), self.field)
        return features.float()


def build_encoder(class_name: str, folder: Path, dtype: str) -> nn.Module:
    """An encoder from the config.json in `folder`, its parameters of `dtype` on the meta device.

    Parameters that share a tensor are one, and buffers hold their real values.
    """
    kind = getattr(transformers, class_name)
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        network = kind(config)
    network.tie_weights()
    for parameter in network.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    built: nn.Module = network.eval().requires_grad_(False)
    return built


def load_encoder(graph: TextGraph, checkpoint: Path) -> nn.Module:
    """The oracle: the encoder as transformers loads it, in float32."""
    kind = getattr(transformers, graph.encoder_class)
    network: nn.Module = kind.from_pretrained(
        checkpoint / graph.component, dtype=torch.float32, local_files_only=True
    )
    return network.eval().requires_grad_(False)


def named_as_in_module(
    stored: Mapping[str, StoredTensor], network: nn.Module, former_prefix: str
) -> dict[str, StoredTensor]:
    """A checkpoint's tensors under the names that `network` has for them.

    One that parameters share may be stored under any of their names, and is given under each. Left
    out are constants that older versions stored (position_ids) and what transformers ignores
    (T5's decoder). Names that the network does not know stay as they are.
    """
    constants = {name for name, _ in network.named_buffers()} - network.state_dict().keys()
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or []
    named = {name.removeprefix(former_prefix): tensor for name, tensor in stored.items()}
    kept = {
        name: tensor
        for name, tensor in named.items()
        if name not in constants and not any(re.search(pattern, name) for pattern in ignored)
    }
    for names in _shared(network):
        found = [kept[name] for name in names if name in kept]
        for name in names if found else ():
            kept.setdefault(name, found[0])
    return kept


def _shared(network: nn.Module) -> list[list[str]]:
    """The names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())
