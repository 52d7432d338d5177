"""Measures whether videos show what their captions say, and draws strips of their frames."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import fields
from pathlib import Path

import judge
import moving_shapes
import torch
from diffusers import HunyuanVideoPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from meancache_trt import standins
from meancache_trt.standins.captions import Scene
from meancache_trt.standins.video_captions import split_scenes

NAMES = (*(field.name for field in fields(Scene)), "motion")
VIDEOS = judge.Drawings(
    {name: len(values) for name, values in zip(NAMES, moving_shapes.ATTRIBUTE_VALUES, strict=True)},
    moving_shapes.attribute_indices,
    moving_shapes.draw,
    per_value=24,
)
COLUMNS, SHOWN_FRAMES = 3, (0, 2, 4, 6, 8)
TILE_PX, CAPTION_PX, GAP_PX = 72, 16, 8


@torch.inference_mode()
def sample(
    pipeline: HunyuanVideoPipeline, captions: list[str], steps: int, guidance_scale: float
) -> Tensor:
    """Videos `(B, 3, 9, 48, 48)` in [-1, 1], one generator per caption."""
    batches = []
    for start in range(0, len(captions), 16):
        chunk = captions[start : start + 16]
        output = pipeline(
            chunk,
            height=moving_shapes.SIDE,
            width=moving_shapes.SIDE,
            num_frames=moving_shapes.FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=32,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
            output_type="pt",
        )
        batches.append(output.frames.transpose(1, 2) * 2 - 1)
    return torch.cat(batches)


def strips(videos: Tensor, captions: list[str]) -> Image.Image:
    """Every other frame of each video in a row under its caption, three videos abreast."""
    width, height = len(SHOWN_FRAMES) * TILE_PX + GAP_PX, TILE_PX + CAPTION_PX + GAP_PX
    rows = -(-len(captions) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP_PX, rows * height + GAP_PX), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for index, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        left, top = GAP_PX + index % COLUMNS * width, GAP_PX + index // COLUMNS * height
        pen.text((left, top), textwrap.shorten(caption, 70), fill="black", font=font)
        sheet.paste(_strip(video), (left, top + CAPTION_PX))
    return sheet


def _strip(video: Tensor) -> Image.Image:
    frames = video[:, SHOWN_FRAMES].permute(2, 1, 3, 0).flatten(1, 2)  # rows, frames x columns
    pixels = ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    size = (len(SHOWN_FRAMES) * TILE_PX, TILE_PX)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def main() -> None:
    """Writes the accuracy on held-out scenes as a table, and their strips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strips", type=Path, help="picture to write")
    parser.add_argument("--table", type=Path, help="Markdown to write")
    folder = standins.path("hunyuan_video")
    parser.add_argument("--folder", type=Path, default=folder, help="pipeline")
    parser.add_argument("--count", type=int, default=36)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=6.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = judge.load(arguments.folder)
    scenes = split_scenes("heldout")[: arguments.count]
    captions = standins.prompts("heldout", "hunyuan_video")[: arguments.count]
    videos = sample(pipeline, captions, arguments.steps, arguments.guidance_scale)
    arguments.strips.parent.mkdir(parents=True, exist_ok=True)
    strips(videos, captions).save(arguments.strips, optimize=True)
    if arguments.table:
        arguments.table.write_text(judge.report(videos, scenes, arguments, VIDEOS, "videos"))


if __name__ == "__main__":
    main()
