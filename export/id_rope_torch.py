"""Transformers that are called with the ids of image and text tokens, as FLUX.1 and FLUX.2 are.

Each id is a place on several axes, of which each has a part of the rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meancache_trt.export.patching import replaced
from meancache_trt.export.timesteps import Times, exact_times, fixed_timestep_frequencies

TIME_UNITS = 1000.0
"""The transformers embed their timestep, and their guidance scale, times this."""

POSITION_ARGUMENTS: tuple[str, ...] = ("img_ids", "txt_ids")

Embed = Callable[[Tensor], Sequence[Tensor]]
"""diffusers' own embedding of ids (tokens, axes): cosines and sines (tokens, width)."""


class _GivenRope(nn.Module):
    """Stands in for the embedding: the "ids" it is called with are finished tables."""

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
        timestep: Tensor,
        image_rope: Tensor,
        text_rope: Tensor,
        pooled_projections: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        scales = (timestep,) if guidance is None else (timestep, guidance)
        self._times.values = tuple(scale * TIME_UNITS for scale in scales)
        pooled = (
            {}
            if pooled_projections is None
            else {"pooled_projections": pooled_projections.to(dtype)}
        )
        velocity: Tensor = self.network(
            hidden_states=hidden_states.to(dtype),
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            **pooled,
            timestep=timestep,
            guidance=guidance,
            img_ids=image_rope,
            txt_ids=text_rope,
            return_dict=False,
        )[0]
        return velocity.float()


@contextmanager
def transformer_graph(network: nn.Module, time_embedding: str) -> Iterator[nn.Module]:
    """`network` with graph inputs for position and constants for frequencies.

    `time_embedding` names its module that is called with timestep and guidance scale first.
    """
    with (
        replaced((network, "pos_embed", _GivenRope())),
        fixed_timestep_frequencies(network),
        exact_times(network.get_submodule(time_embedding)) as times,
    ):
        yield _Transformer(network, times)


class Preparation(nn.Module):
    """Packs noise, and assembles both tables from those of each axis.

    Args:
        embed: see `Embed`; diffusers computes it in float64.
        axes: how many channels of a table each axis has.
        image: which of them count an image's rows and columns.
        text: which counts the text's tokens, if any does.
        positions: how many places an axis has.
        pack: noise to tokens.
        patch: rows, and columns, of the noise in a token.
    """

    def __init__(
        self,
        embed: Embed,
        axes: Sequence[int],
        *,
        image: tuple[int, int],
        text: int | None,
        positions: int,
        pack: Callable[[Tensor], Tensor],
        patch: int,
    ) -> None:
        super().__init__()
        self.axes, self.image, self.text = list(axes), image, text
        self.pack, self.patch = pack, patch
        places = torch.arange(positions)[:, None].expand(-1, len(self.axes))
        for name, table in zip(("cos", "sin"), embed(places), strict=True):
            self.register_buffer(name, table, persistent=False)

    def _image_table(self, table: Tensor, rows: int, columns: int) -> Tensor:
        parts = []
        for axis, part in enumerate(torch.split(table, self.axes, dim=-1)):
            if axis == self.image[0]:
                parts.append(part[:rows, None].expand(-1, columns, -1))
            elif axis == self.image[1]:
                parts.append(part[None, :columns].expand(rows, -1, -1))
            else:
                parts.append(part[:1, None].expand(rows, columns, -1))
        return torch.cat(parts, dim=-1).flatten(0, 1)

    def _text_table(self, table: Tensor, tokens: int) -> Tensor:
        parts = [
            part[:tokens] if axis == self.text else part[:1].expand(tokens, -1)
            for axis, part in enumerate(torch.split(table, self.axes, dim=-1))
        ]
        return torch.cat(parts, dim=-1)

    def forward(self, noise: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """The packed latent, and cosines, then sines, of image and of text (tokens, width)."""
        rows, columns = (extent // self.patch for extent in noise.shape[-2:])
        tables = (self.get_buffer("cos"), self.get_buffer("sin"))
        image = [self._image_table(table, rows, columns) for table in tables]
        text = [self._text_table(table, encoder_hidden_states.shape[1]) for table in tables]
        return self.pack(noise), torch.cat(image, dim=-1), torch.cat(text, dim=-1)


def id_tables(embed: Embed, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Cosines, then sines, of any ids (tokens, axes), by the names of the graph's inputs."""
    return {
        "image_rope": torch.cat(tuple(embed(image)), dim=-1),
        "text_rope": torch.cat(tuple(embed(text)), dim=-1),
    }


def reference_velocity(
    network: nn.Module, feeds: Mapping[str, Tensor], image: Tensor, text: Tensor
) -> Tensor:
    """The unpatched transformer, called with the ids of image and text."""
    inputs = {name: value for name, value in feeds.items() if not name.endswith("_rope")}
    velocity: Tensor = network(**inputs, img_ids=image, txt_ids=text, return_dict=False)[0]
    return velocity


def positions(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Image and text ids (tokens, axes), on the CPU."""
    image, text = (arguments[name].float().cpu() for name in POSITION_ARGUMENTS)
    return _without_batch(image), _without_batch(text)


def _without_batch(ids: Tensor) -> Tensor:
    # The transformers take ids with a batch as well, and read the first sample's.
    return ids[0] if ids.dim() == 3 else ids
