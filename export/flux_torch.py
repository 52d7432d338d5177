"""The wrapper of FLUX.1: modules to trace, and diffusers' own code as the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from meancache_trt.export import autoencoder_kl_torch, id_rope_torch, module_arguments
from meancache_trt.export.family import Configs
from meancache_trt.export.flux import AXIS_POSITIONS, rope_axes
from meancache_trt.export.packing import PACK, pack, unpack

graph_inputs = module_arguments.graph_inputs
POSITION_ARGUMENTS = id_rope_torch.POSITION_ARGUMENTS
positions = id_rope_torch.positions

_ROPE_THETA = 10000  # FluxTransformer2DModel.__init__


def transformer_graph(network: nn.Module) -> AbstractContextManager[nn.Module]:
    """`FluxTransformer2DModel` with graph inputs for position and constants for frequencies."""
    return id_rope_torch.transformer_graph(network, "time_text_embed")


def prepare_graph(network: nn.Module, configs: Configs) -> nn.Module:
    """Noise and text (for its length) to packed latent, image RoPE and text RoPE."""
    return id_rope_torch.Preparation(
        network.get_submodule("pos_embed"),
        rope_axes(configs),
        image=(1, 2),
        text=None,
        positions=AXIS_POSITIONS,
        pack=pack,
        patch=PACK,
    )


def decoder_graph(vae: nn.Module) -> nn.Module:
    """Packed latent with rows and columns apart to pictures, black 0 and white 1, not clipped."""
    return autoencoder_kl_torch.Decoder(vae, unpack)


def _ids(symbols: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    rows, columns = symbols["latent_rows"], symbols["latent_columns"]
    image: Tensor = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    return image, torch.zeros(symbols["text_tokens"], 3)


def reference_velocity(
    network: nn.Module, feeds: Mapping[str, Tensor], symbols: Mapping[str, int]
) -> Tensor:
    """The unpatched transformer, called as FluxPipeline calls it."""
    return id_rope_torch.reference_velocity(network, feeds, *_ids(symbols))


def reference_preparation(
    network: nn.Module, feeds: Mapping[str, Tensor], symbols: Mapping[str, int]
) -> dict[str, Tensor]:
    """What FluxPipeline and `FluxPosEmbed` compute, by the prepare graph's output names."""
    latent = FluxPipeline._pack_latents(feeds["noise"], *feeds["noise"].shape)
    tables = id_rope_torch.id_tables(network.get_submodule("pos_embed"), *_ids(symbols))
    return {"latent": latent, **tables}


def reference_image(vae: nn.Module, latent: Tensor, symbols: Mapping[str, int]) -> Tensor:
    """What FluxPipeline does after the loop, up to the picture in [0, 1]."""
    factor = symbols["height"] // symbols["latent_height"]
    packed = latent.flatten(1, 2)
    unpacked = FluxPipeline._unpack_latents(packed, symbols["height"], symbols["width"], factor)
    return autoencoder_kl_torch.reference_image(vae, unpacked, symbols)


def encode_prompts(pipeline: Any, prompts: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
    """T5 features (B, text_tokens, D) and CLIP's pooled feature (B, P)."""
    features, pooled, _ = pipeline.encode_prompt(
        list(prompts), device="cpu", max_sequence_length=text_tokens
    )
    return {"encoder_hidden_states": features, "pooled_projections": pooled}


def position_tables(configs: Configs, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Cosines, then sines, of any ids."""
    embed = FluxPosEmbed(theta=_ROPE_THETA, axes_dim=list(rope_axes(configs)))
    return id_rope_torch.id_tables(embed, image, text)
