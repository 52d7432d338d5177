"""The wrapper of Stable Diffusion 3: modules to trace, and diffusers' own code as the oracle.

The position table is one of the checkpoint's tensors, stored and rounded like the others, so it is
a weight of the transformer's graph, which crops it to the size that it is called with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meancache_trt.errors import InputError
from meancache_trt.export import autoencoder_kl_torch, module_arguments
from meancache_trt.export.family import Configs
from meancache_trt.export.patching import replaced
from meancache_trt.export.sd3 import table_side
from meancache_trt.export.timesteps import fixed_timestep_frequencies

decoder_graph = autoencoder_kl_torch.decoder_graph
reference_image = autoencoder_kl_torch.reference_image
graph_inputs = module_arguments.graph_inputs

POSITION_ARGUMENTS: tuple[str, ...] = ()


def _transposed(equation: str, operand: Tensor) -> Tensor:
    """`torch.einsum` of one operand, which backends do not have in bfloat16."""
    axes, wanted = equation.split("->")
    return operand.permute([axes.index(axis) for axis in wanted])


class _Transformer(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        velocity: Tensor = self.network(
            hidden_states=hidden_states.to(dtype),
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            pooled_projections=pooled_projections.to(dtype),
            timestep=timestep,
            return_dict=False,
        )[0]
        return velocity.float()


@contextmanager
def transformer_graph(network: nn.Module) -> Iterator[nn.Module]:
    """`SD3Transformer2DModel`, its frequencies constants and its unpatching a transposition.

    Replaces `torch.einsum` meanwhile.
    """
    with replaced((torch, "einsum", _transposed)), fixed_timestep_frequencies(network):
        yield _Transformer(network)


class _Prepare(nn.Module):
    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return noise.clone(), torch.cat([noise, noise])


def prepare_graph(network: nn.Module, configs: Configs) -> nn.Module:  # noqa: ARG001
    """Noise to the loop's latent, which is the same, and the same twice."""
    return _Prepare()


def reference_velocity(
    network: nn.Module,
    feeds: Mapping[str, Tensor],
    symbols: Mapping[str, int],  # noqa: ARG001
) -> Tensor:
    """The unpatched transformer, called as StableDiffusion3Pipeline calls it."""
    velocity: Tensor = network(**feeds, return_dict=False)[0]
    return velocity


def reference_preparation(
    network: nn.Module,  # noqa: ARG001
    feeds: Mapping[str, Tensor],
    symbols: Mapping[str, int],  # noqa: ARG001
) -> dict[str, Tensor]:
    """The noise itself, and as StableDiffusion3Pipeline doubles it."""
    noise = feeds["noise"]
    return {"latent": noise, "model_input": torch.cat([noise] * 2)}


def encode_prompts(pipeline: Any, prompts: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
    """Features (B, CLIP's tokens + text_tokens, D) and both CLIPs' pooled features (B, P)."""
    features, _, pooled, _ = pipeline.encode_prompt(
        list(prompts),
        None,
        None,
        device="cpu",
        do_classifier_free_guidance=False,
        max_sequence_length=text_tokens,
    )
    return {"encoder_hidden_states": features, "pooled_projections": pooled}


def positions(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the latent."""
    rows, columns = arguments["hidden_states"].shape[2:]
    return rows, columns


def position_tables(configs: Configs, rows: int, columns: int) -> dict[str, Tensor]:
    """None: the graph has its own. Raises `InputError` for a latent that is larger."""
    side = table_side(configs) * configs["transformer"]["patch_size"]
    if max(rows, columns) > side:
        raise InputError(
            f"expected a latent of at most {side} x {side}, which the checkpoint's positions "
            f"cover, found {rows} x {columns}; make a smaller picture"
        )
    return {}
