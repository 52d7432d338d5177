"""Measures whether pictures show what their captions say, by comparison with drawings."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import shapes
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from torch import Tensor

from meancache_trt import standins
from meancache_trt.standins.captions import Scene, split_scenes

DRAWINGS_PER_VALUE = 160


def attribute_accuracy(pictures: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """For each attribute, how often the nearest drawing has the captioned value.

    `pictures` are `(B, 3, 64, 64)` in [-1, 1]. The other attributes are taken from the
    caption, and placement is free within what the drawing itself varies.
    """
    generator = torch.Generator().manual_seed(9)
    names = [field.name for field in fields(Scene)]
    attributes = shapes.attribute_indices(scenes)
    return {
        name: sum(
            _nearest(picture, row, column, generator) == int(row[column])
            for picture, row in zip(pictures, attributes, strict=True)
        )
        / len(scenes)
        for column, name in enumerate(names)
    }


def _nearest(picture: Tensor, row: Tensor, column: int, generator: torch.Generator) -> int:
    """The value of one attribute whose drawings come closest to the picture."""
    count = len(shapes.ATTRIBUTE_VALUES[column])
    candidates = row.repeat(count * DRAWINGS_PER_VALUE, 1)
    candidates[:, column] = torch.arange(count).repeat_interleave(DRAWINGS_PER_VALUE)
    error = (shapes.draw(candidates, generator) - picture).square().flatten(1).mean(1)
    return int(error.argmin()) // DRAWINGS_PER_VALUE


def load(folder: Path | None) -> DiffusionPipeline:
    """The pipeline in a folder, by default the packaged FLUX stand-in, in float32."""
    pipeline = DiffusionPipeline.from_pretrained(folder or standins.path("flux"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


@torch.inference_mode()
def sample(
    pipeline: DiffusionPipeline,
    captions: list[str],
    steps: int,
    guidance_scale: float,
    seed: int = 0,
) -> Tensor:
    """Pictures `(B, 3, 64, 64)` in [-1, 1], one generator per caption."""
    batches = []
    for start in range(0, len(captions), 16):
        chunk = captions[start : start + 16]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        output = pipeline(
            chunk,
            height=shapes.IMAGE_SIZE,
            width=shapes.IMAGE_SIZE,
            num_inference_steps=steps,
            max_sequence_length=32,
            generator=generators,
            output_type="pt",
            **_guidance(pipeline, guidance_scale, len(chunk)),
        )
        batches.append(output.images * 2 - 1)
    return torch.cat(batches)


def _guidance(pipeline: DiffusionPipeline, scale: float, count: int) -> dict[str, Any]:
    if isinstance(pipeline, QwenImagePipeline):
        return {"true_cfg_scale": scale, "negative_prompt": [""] * count}
    return {"guidance_scale": scale}


def table(drawings: dict[str, float], pictures: dict[str, float], heading: str) -> str:
    """The accuracies as a Markdown table; those of true drawings are the ceiling."""
    rows = "\n".join(
        f"| {name} | {pictures[name]:.0%} | {drawings[name]:.0%} |" for name in pictures
    )
    return f"{heading}\n\n| attribute | pictures | true drawings |\n|---|---|---|\n{rows}\n"


def main() -> None:
    """Writes the accuracy on held-out scenes, and that of true drawings, as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--folder", type=Path, default=None, help="pipeline; default: the packaged FLUX one"
    )
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=3.5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = load(arguments.folder)
    scenes = list(split_scenes("heldout")[: arguments.count])
    captions = standins.prompts("heldout")[: arguments.count]
    pictures = sample(pipeline, captions, arguments.steps, arguments.guidance_scale)
    drawings = shapes.draw(shapes.attribute_indices(scenes), torch.Generator().manual_seed(10))
    heading = (
        f"The first {len(scenes)} `heldout` prompts at {arguments.steps} steps and guidance scale "
        f"{arguments.guidance_scale}: how often the nearest of {DRAWINGS_PER_VALUE} drawings per "
        "value has the captioned one, the other attributes given."
    )
    accuracies = (attribute_accuracy(images, scenes) for images in (drawings, pictures))
    arguments.output.write_text(table(*accuracies, heading))


if __name__ == "__main__":
    main()
