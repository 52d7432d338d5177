"""Draws a grid of captioned held-out samples of a stand-in."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import judge
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from meancache_trt import standins

COLUMNS, ROWS = 8, 6
TILE_PX, CAPTION_PX, GAP_PX = 128, 30, 6


def grid(pictures: Tensor, captions: list[str]) -> Image.Image:
    """Pictures `(48, 3, 64, 64)` in [-1, 1], enlarged twice, each under its caption."""
    cell_width, cell_height = TILE_PX + GAP_PX, TILE_PX + CAPTION_PX + GAP_PX
    sheet = Image.new("RGB", (COLUMNS * cell_width + GAP_PX, ROWS * cell_height + GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=9)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = GAP_PX + index % COLUMNS * cell_width
        top = GAP_PX + index // COLUMNS * cell_height
        lines = "\n".join(textwrap.wrap(caption, 27)[:3])
        pen.multiline_text((left, top), lines, fill="black", font=font, spacing=1)
        sheet.paste(_tile(picture), (left, top + CAPTION_PX))
    return sheet


def _tile(picture: Tensor) -> Image.Image:
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST)


def main() -> None:
    """Samples the first held-out prompts and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", type=Path, default=standins.path("flux"), help="pipeline")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=3.5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = judge.load(arguments.folder)
    captions = standins.prompts("heldout")[: COLUMNS * ROWS]
    pictures = judge.sample(pipeline, captions, arguments.steps, arguments.guidance_scale)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, captions).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
