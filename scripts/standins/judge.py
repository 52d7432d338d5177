"""Measures whether pictures show what their captions say, by comparison with drawings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import shapes
import torch
from diffusers import FluxPipeline
from torch import Tensor

from meancache_trt import standins
from meancache_trt.standins.captions import Scene, split_scenes

DRAWINGS_PER_VALUE = 160


@dataclass(frozen=True)
class Drawings:
    """What samples are compared with: scenes as indices `(B, attributes)`, and their drawings.

    `values` are how many each attribute has, by its name, in the order of the indices.
    """

    values: Mapping[str, int]
    indices: Callable[[Sequence[Any]], Tensor]
    draw: Callable[[Tensor, torch.Generator], Tensor]
    per_value: int = DRAWINGS_PER_VALUE


PICTURES = Drawings(
    {
        field.name: len(values)
        for field, values in zip(fields(Scene), shapes.ATTRIBUTE_VALUES, strict=True)
    },
    shapes.attribute_indices,
    shapes.draw,
)


def attribute_accuracy(
    samples: Tensor, scenes: Sequence[Any], drawings: Drawings = PICTURES
) -> dict[str, float]:
    """For each attribute, how often the nearest drawing has the captioned value.

    `samples` are what `drawings` draws, in [-1, 1]. The other attributes are taken from the
    caption, and placement is free within what the drawing itself varies.
    """
    generator = torch.Generator().manual_seed(9)
    attributes = drawings.indices(scenes)
    return {
        name: sum(
            _nearest(sample, row, column, drawings, generator) == int(row[column])
            for sample, row in zip(samples, attributes, strict=True)
        )
        / len(scenes)
        for column, name in enumerate(drawings.values)
    }


def _nearest(
    sample: Tensor, row: Tensor, column: int, drawings: Drawings, generator: torch.Generator
) -> int:
    """The value of one attribute whose drawings come closest to the sample."""
    count = list(drawings.values.values())[column]
    candidates = row.repeat(count * drawings.per_value, 1)
    candidates[:, column] = torch.arange(count).repeat_interleave(drawings.per_value)
    error = (drawings.draw(candidates, generator) - sample).square().flatten(1).mean(1)
    return int(error.argmin()) // drawings.per_value


@torch.inference_mode()
def sample(
    pipeline: FluxPipeline, captions: list[str], steps: int, guidance_scale: float, seed: int = 0
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
            guidance_scale=guidance_scale,
            max_sequence_length=32,
            generator=generators,
            output_type="pt",
        )
        batches.append(output.images * 2 - 1)
    return torch.cat(batches)


def table(
    drawings: dict[str, float], samples: dict[str, float], heading: str, kind: str = "pictures"
) -> str:
    """The accuracies as a Markdown table; those of true drawings are the ceiling."""
    rows = "\n".join(f"| {name} | {samples[name]:.0%} | {drawings[name]:.0%} |" for name in samples)
    return f"{heading}\n\n| attribute | {kind} | true drawings |\n|---|---|---|\n{rows}\n"


def main() -> None:
    """Writes the accuracy on held-out scenes, and that of true drawings, as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=3.5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = FluxPipeline.from_pretrained(standins.path("flux")).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
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
