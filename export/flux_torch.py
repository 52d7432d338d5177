"""The wrapper of FLUX.1: modules to trace, and diffusers' own code as the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from meancache_trt.export import autoencoder_kl_torch, module_arguments
from meancache_trt.export.family import Configs
from meancache_trt.export.flux import AXIS_POSITIONS, rope_axes
from meancache_trt.export.packing import PACK, pack, unpack
from meancache_trt.export.timesteps import Times, exact_times, fixed_timestep_frequencies

TIME_UNITS = 1000.0
"""FluxTransformer2DModel embeds its timestep, and its guidance scale, times this."""

graph_inputs = module_arguments.graph_inputs

POSITION_ARGUMENTS: tuple[str, ...] = ("img_ids", "txt_ids")

_ROPE_THETA = 10000  # FluxTransformer2DModel.__init__


class _GivenRope(nn.Module):
    """Stands in for `FluxPosEmbed`: the "ids" it is called with are finished tables."""

    def forward(self, tables: Tensor) -> tuple[Tensor, ...]:
        return tables.chunk(2, dim=-1)


class _Transformer(nn.Module):
    def __init__(self, network: nn.Module, times: Times) -> None:
        super().__init__()
        self.network = network
        self._times = times

    def forward(
        self,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        image_rope: Tensor,
        text_rope: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        scales = (timestep,) if guidance is None else (timestep, guidance)
        self._times.values = tuple(scale * TIME_UNITS for scale in scales)
        velocity: Tensor = self.network(
            hidden_states=hidden_states.to(dtype),
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            pooled_projections=pooled_projections.to(dtype),
            timestep=timestep,
            guidance=guidance,
            img_ids=image_rope,
            txt_ids=text_rope,
            return_dict=False,
        )[0]
        return velocity.float()


@contextmanager
def transformer_graph(network: nn.Module) -> Iterator[nn.Module]:
    """`FluxTransformer2DModel` with graph inputs for position and constants for frequencies."""
    embedding = network.pos_embed
    network.pos_embed = _GivenRope()
    try:
        with (
            fixed_timestep_frequencies(network),
            exact_times(network.get_submodule("time_text_embed")) as times,
        ):
            yield _Transformer(network, times)
    finally:
        network.pos_embed = embedding


class _Prepare(nn.Module):
    """Packs noise, and assembles RoPE from one table an axis, computed by diffusers in float64."""

    def __init__(self, embedding: nn.Module, axes: Sequence[int]) -> None:
        super().__init__()
        self.axes = list(axes)
        positions = torch.arange(AXIS_POSITIONS)[:, None].expand(-1, len(self.axes))
        for name, table in zip(("cos", "sin"), embedding(positions), strict=True):
            self.register_buffer(name, table, persistent=False)

    def _image(self, table: Tensor, rows: int, columns: int) -> Tensor:
        index, row, column = torch.split(table, self.axes, dim=-1)
        parts = (
            index[:1, None].expand(rows, columns, -1),
            row[:rows, None].expand(-1, columns, -1),
            column[None, :columns].expand(rows, -1, -1),
        )
        return torch.cat(parts, dim=-1).flatten(0, 1)

    def forward(self, noise: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        rows, columns = (extent // PACK for extent in noise.shape[2:])
        tables = (self.get_buffer("cos"), self.get_buffer("sin"))
        image = torch.cat([self._image(table, rows, columns) for table in tables], dim=-1)
        origin = torch.cat([table[:1] for table in tables], dim=-1)
        return pack(noise), image, origin.expand(encoder_hidden_states.shape[1], -1)


def prepare_graph(network: nn.Module, configs: Configs) -> nn.Module:
    """Noise and text (for its length) to packed latent, image RoPE and text RoPE."""
    return _Prepare(network.get_submodule("pos_embed"), rope_axes(configs))


def decoder_graph(vae: nn.Module) -> nn.Module:
    """Packed latent with rows and columns apart to pictures, black 0 and white 1, not clipped."""
    return autoencoder_kl_torch.Decoder(vae, unpack)


def _image_ids(symbols: Mapping[str, int]) -> Tensor:
    rows, columns = symbols["latent_rows"], symbols["latent_columns"]
    ids: Tensor = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    return ids


def reference_velocity(
    network: nn.Module, feeds: Mapping[str, Tensor], symbols: Mapping[str, int]
) -> Tensor:
    """The unpatched transformer, called as FluxPipeline calls it."""
    inputs = {name: value for name, value in feeds.items() if not name.endswith("_rope")}
    velocity: Tensor = network(
        **inputs,
        img_ids=_image_ids(symbols),
        txt_ids=torch.zeros(symbols["text_tokens"], 3),
        return_dict=False,
    )[0]
    return velocity


def reference_preparation(
    network: nn.Module, feeds: Mapping[str, Tensor], symbols: Mapping[str, int]
) -> dict[str, Tensor]:
    """What FluxPipeline and `FluxPosEmbed` compute, by the prepare graph's output names."""
    noise, embed = feeds["noise"], network.get_submodule("pos_embed")
    return {
        "latent": FluxPipeline._pack_latents(noise, *noise.shape),
        "image_rope": torch.cat(embed(_image_ids(symbols)), dim=-1),
        "text_rope": torch.cat(embed(torch.zeros(symbols["text_tokens"], 3)), dim=-1),
    }


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


def positions(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Image and text ids (tokens, axes), float32 as `FluxPosEmbed` reads them."""
    image, text = (arguments[name] for name in POSITION_ARGUMENTS)
    return _without_batch(image).float(), _without_batch(text).float()


def _without_batch(ids: Tensor) -> Tensor:
    # FluxTransformer2DModel still takes ids with a batch, and reads the first sample's.
    return ids[0] if ids.dim() == 3 else ids


def position_tables(configs: Configs, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Cosines, then sines, of any ids."""
    embed = FluxPosEmbed(theta=_ROPE_THETA, axes_dim=list(rope_axes(configs)))
    return {
        "image_rope": torch.cat(embed(image.cpu()), dim=-1),
        "text_rope": torch.cat(embed(text.cpu()), dim=-1),
    }
