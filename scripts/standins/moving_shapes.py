"""Draws captioned videos: the shapes of `shapes`, moving up or down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace

import shapes
import torch
from torch import Tensor

from meancache_trt.standins.video_captions import MOTIONS, VideoScene

SIDE = 48
FRAMES = 9
ATTRIBUTE_VALUES = (*shapes.ATTRIBUTE_VALUES, MOTIONS)

_DIRECTIONS = {"still": 0.0, "rising": -1.0, "falling": 1.0}  # rows count downwards
_PLAY_PX = 2.0


def attribute_indices(scenes: Sequence[VideoScene]) -> Tensor:
    """Scenes as indices `(B, 7)`: the picture's in the order of its caption, and the motion's."""
    pictures = shapes.attribute_indices([scene.picture for scene in scenes])
    motions = torch.tensor([MOTIONS.index(scene.motion) for scene in scenes])
    return torch.cat([pictures, motions.unsqueeze(1)], 1)


def draw(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Videos `(B, 3, 9, 48, 48)` in [-1, 1] of scenes given as indices `(B, 7)`.

    What moves crosses the picture from near one edge to near the other, at constant speed.
    """
    pictures, motion = attributes[:, :6], attributes[:, 6]
    placement = shapes.place(pictures, generator)
    moving = [value.repeat_interleave(FRAMES, 0) for value in astuple(placement)]
    placements = replace(shapes.Placement(*moving), centre_y=_heights(placement, motion))
    frames = shapes.paint(pictures.repeat_interleave(FRAMES, 0), placements, SIDE)
    return frames.unflatten(0, (-1, FRAMES)).transpose(1, 2).contiguous()


def videos(
    scenes: list[VideoScene], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (indices into `scenes` `(B,)`, videos `(B, 3, 9, 48, 48)`)."""
    attributes = attribute_indices(scenes)
    while True:
        rows = torch.randint(len(scenes), (batch_size,), generator=generator)
        yield rows, draw(attributes[rows], generator)


def _heights(placement: shapes.Placement, motion: Tensor) -> Tensor:
    """Rows of the centres, `(9 B, 1, 1)`: as placed, or from one side of that to the other."""
    half = shapes.IMAGE_SIZE / 2
    direction = torch.tensor([_DIRECTIONS[name] for name in MOTIONS])[motion].view(-1, 1, 1)
    reach = half - placement.radius - shapes.MARGIN_PX - _PLAY_PX
    play = (placement.centre_y - half) * torch.where(direction == 0, 1.0, 0.5)
    course = torch.linspace(-1, 1, FRAMES)
    return (half + play + direction * reach * course).flatten().view(-1, 1, 1)
