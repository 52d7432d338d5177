"""The wrapper of FLUX.2: modules to trace, and diffusers' own code as the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import Flux2Pipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from torch import Tensor, nn

from meancache_trt.export import id_rope_torch, module_arguments
from meancache_trt.export.family import Configs
from meancache_trt.export.flux2 import AXIS_POSITIONS, rope_axes
from meancache_trt.export.packing import unpack

graph_inputs = module_arguments.graph_inputs
POSITION_ARGUMENTS = id_rope_torch.POSITION_ARGUMENTS
positions = id_rope_torch.positions


def transformer_graph(network: nn.Module) -> AbstractContextManager[nn.Module]:
    """`Flux2Transformer2DModel` with graph inputs for position and constants for frequencies."""
    return id_rope_torch.transformer_graph(network, "time_guidance_embed")


def prepare_graph(network: nn.Module, configs: Configs) -> nn.Module:
    """Noise and text (for its length) to tokens, image RoPE and text RoPE."""
    return id_rope_torch.Preparation(
        network.get_submodule("pos_embed"),
        rope_axes(configs),
        image=(1, 2),
        text=3,
        positions=AXIS_POSITIONS,
        pack=lambda noise: noise.flatten(2).mT.clone(),
        patch=1,
    )


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.network = vae

    def forward(self, latent: Tensor) -> Tensor:
        vae: Any = self.network
        mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
        unpacked = unpack(latent * torch.sqrt(variance + vae.config.batch_norm_eps) + mean)
        image: Tensor = vae.decode(unpacked.to(vae.dtype), return_dict=False)[0]
        return image.float() * 0.5 + 0.5  # VaeImageProcessor.denormalize, which clips afterwards


def decoder_graph(vae: nn.Module) -> nn.Module:
    """Normed latent with rows and columns apart to pictures, black 0 and white 1, not clipped."""
    return _Decoder(vae)


def _ids(symbols: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    latent = torch.empty(1, 1, symbols["latent_rows"], symbols["latent_columns"])
    text = torch.empty(1, symbols["text_tokens"], 1)
    return Flux2Pipeline._prepare_latent_ids(latent)[0], Flux2Pipeline._prepare_text_ids(text)[0]


def reference_velocity(
    network: nn.Module, feeds: Mapping[str, Tensor], symbols: Mapping[str, int]
) -> Tensor:
    """The unpatched transformer, called as Flux2Pipeline calls it."""
    return id_rope_torch.reference_velocity(network, feeds, *_ids(symbols))


def reference_preparation(
    network: nn.Module, feeds: Mapping[str, Tensor], symbols: Mapping[str, int]
) -> dict[str, Tensor]:
    """What Flux2Pipeline and `Flux2PosEmbed` compute, by the prepare graph's output names."""
    tables = id_rope_torch.id_tables(network.get_submodule("pos_embed"), *_ids(symbols))
    return {"latent": Flux2Pipeline._pack_latents(feeds["noise"]), **tables}


def reference_image(vae: nn.Module, latent: Tensor, symbols: Mapping[str, int]) -> Tensor:
    """What Flux2Pipeline does after the loop, up to the picture in [0, 1]."""
    model: Any = vae
    ids = _ids(symbols)[0].expand(len(latent), -1, -1)
    normed = Flux2Pipeline._unpack_latents_with_ids(latent.flatten(1, 2), ids)
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
    unpacked = Flux2Pipeline._unpatchify_latents(normed * deviation + mean)
    image: Tensor = model.decode(unpacked, return_dict=False)[0]
    pictures: Tensor = VaeImageProcessor().postprocess(image, output_type="pt")
    return pictures


def encode_prompts(pipeline: Any, prompts: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
    """Three layers' features side by side (B, text_tokens, 3 D), of padding too."""
    features, _ = pipeline.encode_prompt(
        list(prompts), device="cpu", max_sequence_length=text_tokens
    )
    return {"encoder_hidden_states": features}


def position_tables(configs: Configs, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Cosines, then sines, of any ids."""
    theta = configs["transformer"]["rope_theta"]
    return id_rope_torch.id_tables(Flux2PosEmbed(theta, list(rope_axes(configs))), image, text)
