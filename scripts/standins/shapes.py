"""Draws captioned shapes: batched, antialiased, differentiable nowhere and cheap on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from meancache_trt.standins.captions import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    PATTERNS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
)

IMAGE_SIZE = 64
ATTRIBUTE_VALUES = (SIZES, PATTERNS, COLOURS, SHAPES, POSITIONS, BACKGROUNDS)
MARGIN_PX = 3.0

_RADIUS_PX = {"small": (9.0, 11.0), "large": (16.5, 19.0)}
_PATTERN_PERIOD_PX = 8.0
_PATTERN_DARKNESS = 0.62
_MAX_TILT_RADIANS = 0.2

Distance = Callable[[Tensor, Tensor], Tensor]
Colours = Mapping[str, tuple[float, float, float]]


def attribute_indices(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as indices `(B, 6)` in the order of the bare caption."""
    rows = [
        [values.index(word) for values, word in zip(ATTRIBUTE_VALUES, astuple(scene), strict=True)]
        for scene in scenes
    ]
    return torch.tensor(rows)


@dataclass(frozen=True)
class Placement:
    """What varies between drawings of one scene, `(B, 1, 1)` each; lengths are in pixels of 64."""

    radius: Tensor
    centre_x: Tensor
    centre_y: Tensor
    tilt: Tensor
    slope: Tensor


def draw(attributes: Tensor, generator: torch.Generator, colours: Colours = COLOUR_RGB) -> Tensor:
    """Pictures `(B, 3, 64, 64)` in [-1, 1] of scenes given as indices `(B, 6)`.

    Position, tilt, radius and shading vary with the generator.
    """
    return paint(attributes, place(attributes, generator), colours=colours)


def place(attributes: Tensor, generator: torch.Generator) -> Placement:
    """A random placement for each scene, within what its size and position say."""
    radius = _radius(attributes[:, 0], generator)
    count, half = len(attributes), IMAGE_SIZE / 2
    side = attributes[:, 4].view(-1, 1, 1) - 1
    return Placement(
        radius,
        half + side * (half - radius - MARGIN_PX) + _uniform(count, -1.5, 1.5, generator),
        half + _uniform(count, -4, 4, generator),
        _uniform(count, -_MAX_TILT_RADIANS, _MAX_TILT_RADIANS, generator),
        _uniform(count, -0.06, 0.06, generator),
    )


def paint(
    attributes: Tensor,
    placement: Placement,
    side: int = IMAGE_SIZE,
    colours: Colours = COLOUR_RGB,
) -> Tensor:
    """Pictures `(B, 3, side, side)` in [-1, 1] of placed scenes; edges are as soft at any side."""
    _, pattern, colour, shape, _, background = attributes.unbind(1)
    radius = placement.radius
    dx, dy = _offsets(placement, side)
    x, y = _tilted(dx, dy, placement.tilt)
    softness = 2.5 * side / IMAGE_SIZE
    inside = torch.sigmoid(-softness * radius * _distance(shape, x / radius, y / radius))
    texture = _texture(pattern, x, y)
    shade = (1 - 0.18 * (0.7 * dy + 0.4 * dx) / radius).clamp(0.7, 1.2)
    paint = _rgb(colours)[colour].view(-1, 3, 1, 1) * (shade * texture).unsqueeze(1)
    backdrop = _backdrop(background, dx, dy, placement)
    picture = torch.lerp(backdrop, paint, inside.unsqueeze(1))
    return picture.clamp(0, 1) * 2 - 1


def _rgb(table: Colours) -> Tensor:
    return torch.tensor(list(table.values()))


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(count, generator=generator) * (high - low) + low).view(-1, 1, 1)


def _radius(size: Tensor, generator: torch.Generator) -> Tensor:
    low, high = torch.tensor([_RADIUS_PX[name] for name in SIZES])[size].unbind(1)
    draw = torch.rand(len(size), generator=generator)
    return torch.lerp(low, high, draw).view(-1, 1, 1)


def _offsets(placement: Placement, side: int) -> tuple[Tensor, Tensor]:
    """Coordinates of pixels relative to the centre of the shape, `(B, side, side)` each."""
    pixels = (torch.arange(side) + 0.5) * (IMAGE_SIZE / side)
    dx = pixels.view(1, 1, -1) - placement.centre_x
    return torch.broadcast_tensors(dx, pixels.view(1, -1, 1) - placement.centre_y)


def _tilted(dx: Tensor, dy: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cosine, sine = angle.cos(), angle.sin()
    return cosine * dx + sine * dy, cosine * dy - sine * dx


def _distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to each picture's own shape of radius 1; only needed shapes are evaluated."""
    result = torch.empty_like(x)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero().squeeze(1)
        if len(rows):
            result[rows] = _DISTANCES[name](x[rows], y[rows])
    return result


def _texture(pattern: Tensor, x: Tensor, y: Tensor) -> Tensor:
    wave = 2 * math.pi / _PATTERN_PERIOD_PX
    stripes = torch.sigmoid(5 * torch.sin(wave * (x + y) / math.sqrt(2)))
    dots = torch.sigmoid(6 * (torch.cos(wave * x) + torch.cos(wave * y) - 0.55))
    choice = torch.stack([torch.zeros_like(x), stripes, dots], 1)
    dark = choice[torch.arange(len(pattern)), pattern]
    return 1 - _PATTERN_DARKNESS * dark


def _backdrop(background: Tensor, dx: Tensor, dy: Tensor, placement: Placement) -> Tensor:
    """A background with a slight vertical gradient and a soft shadow under the shape."""
    radius = placement.radius
    gradient = placement.slope * torch.linspace(-1, 1, dx.shape[-1]).view(1, -1, 1)
    shadow_distance = torch.hypot(dx - 0.25 * radius, dy - 0.3 * radius) - radius
    shadow = 1 - 0.22 * torch.sigmoid(-shadow_distance / 2)
    colour = _rgb(BACKGROUND_RGB)[background].view(-1, 3, 1, 1)
    return (colour + gradient.unsqueeze(1)) * shadow.unsqueeze(1)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.86


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(0.863 * x.abs() - 0.506 * (y + 1), y - 0.75)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76).abs() - 0.24


def _cross(x: Tensor, y: Tensor) -> Tensor:
    arm, length = 0.32, 1.0
    upright = torch.maximum(x.abs() - arm, y.abs() - length)
    level = torch.maximum(y.abs() - arm, x.abs() - length)
    return torch.minimum(upright, level)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: fold the plane into one half wedge, then one straight edge."""
    inner, wedge = 0.45, math.pi / 5
    radius = torch.hypot(x, y) / 1.08
    angle = torch.remainder(torch.atan2(x, -y) + wedge, 2 * wedge) - wedge
    along, across = radius * angle.cos(), radius * angle.abs().sin()
    tip_to_notch = (inner * math.cos(wedge) - 1, inner * math.sin(wedge))
    norm = math.hypot(*tip_to_notch)
    return ((along - 1) * tip_to_notch[1] - across * tip_to_notch[0]) / norm


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Exact heart distance (Inigo Quilez, "2D distance functions"), scaled to radius 1."""
    scale = 0.62
    u, v = (x * scale).abs(), 0.58 - y * scale
    lobe = torch.hypot(u - 0.25, v - 0.75) - math.sqrt(2) / 4
    middle = 0.5 * (u + v).clamp(min=0)
    corner = torch.minimum(torch.hypot(u, v - 1), torch.hypot(u - middle, v - middle))
    return torch.where(u + v > 1, lobe, corner * torch.sign(u - v)) / scale


def _moon(x: Tensor, y: Tensor) -> Tensor:
    bite = 0.80 - torch.hypot(x - 0.48, y + 0.14)
    return torch.maximum(torch.hypot(x, y) - 1, bite)


_DISTANCES: dict[str, Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
}
