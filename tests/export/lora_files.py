"""LoRA files with random weights, in the names of several tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.export.tiny_flux import tiny_transformer

Tensors = dict[str, Tensor]


def pair(outputs: int, inputs: int, *, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Down (rank, inputs) and up (outputs, rank)."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator)
    return down / inputs**0.5, torch.randn(outputs, rank, generator=generator)


def pairs(
    network: nn.Module, modules: Sequence[str], rank: int = 2
) -> dict[str, tuple[Tensor, Tensor]]:
    """Random matrices for modules of a network, by their names."""
    shapes = {name: network.get_submodule(name).weight.shape for name in modules}
    return {
        name: pair(*shape, rank=rank, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def diffusers_names(layers: Mapping[str, tuple[Tensor, Tensor]]) -> Tensors:
    """As diffusers' `save_lora_weights` has them."""
    named: Tensors = {}
    for module, (down, up) in layers.items():
        named[f"transformer.{module}.lora_A.weight"] = down
        named[f"transformer.{module}.lora_B.weight"] = up
    return named


def kohya_names(layers: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> Tensors:
    """As sd-scripts has them: underscores, and an alpha for each layer."""
    named: Tensors = {}
    for module, (down, up) in layers.items():
        layer = f"lora_unet_{module.replace('.', '_')}"
        named[f"{layer}.lora_down.weight"] = down
        named[f"{layer}.lora_up.weight"] = up
        named[f"{layer}.alpha"] = torch.tensor(alpha)
    return named


def write(file: Path, tensors: Tensors, header: dict[str, str] | None = None) -> Path:
    """Write them to a file."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, header)
    return file


def one_layer(module: str = "context_embedder") -> Tensors:
    """A LoRA of one layer of the tiny FLUX.1, in diffusers' names."""
    return diffusers_names(pairs(tiny_transformer(), [module]))
