"""Measures whether pictures show what their captions say, by comparison with drawings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import shapes
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from meancache_trt import standins
from meancache_trt.standins.captions import Scene, split_scenes


@dataclass(frozen=True)
class Drawings:
    """What samples are compared with: scenes as indices `(B, attributes)`, and their drawings.

    `values` are how many each attribute has, by its name, in the order of the indices.
    """

    values: Mapping[str, int]
    indices: Callable[[Sequence[Any]], Tensor]
    draw: Callable[[Tensor, torch.Generator], Tensor]
    per_value: int


PICTURES = Drawings(
    {
        field.name: len(values)
        for field, values in zip(fields(Scene), shapes.ATTRIBUTE_VALUES, strict=True)
    },
    shapes.attribute_indices,
    shapes.draw,
    per_value=160,
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


def load(folder: Path) -> DiffusionPipeline:
    """The pipeline in a folder, in float32, without a progress bar."""
    pipeline = DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def sample(
    pipeline: DiffusionPipeline, captions: list[str], steps: int, guidance_scale: float
) -> Tensor:
    """Pictures `(B, 3, 64, 64)` in [-1, 1], one generator per caption."""
    batches = []
    for start in range(0, len(captions), 16):
        chunk = captions[start : start + 16]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chunk))]
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
    """The scale as an input of the transformer that has one, else against the empty caption."""
    if pipeline.transformer.config.guidance_embeds:
        return {"guidance_scale": scale}
    return {"true_cfg_scale": scale, "negative_prompt": [""] * count}


def report(
    samples: Tensor,
    scenes: Sequence[Any],
    options: argparse.Namespace,
    drawings: Drawings = PICTURES,
    kind: str = "pictures",
) -> str:
    """A Markdown table of the accuracies; those of true drawings are the ceiling.

    `options` are the `steps` and the `guidance_scale` that the samples were made with.
    """
    true = drawings.draw(drawings.indices(scenes), torch.Generator().manual_seed(10))
    ceiling, found = (attribute_accuracy(each, scenes, drawings) for each in (true, samples))
    rows = "\n".join(f"| {name} | {found[name]:.0%} | {ceiling[name]:.0%} |" for name in found)
    return (
        f"The first {len(scenes)} `heldout` prompts at {options.steps} steps and guidance scale "
        f"{options.guidance_scale}: how often the nearest of {drawings.per_value} drawings per "
        "value has the captioned one, the other attributes given.\n\n"
        f"| attribute | {kind} | true drawings |\n|---|---|---|\n{rows}\n"
    )


def main() -> None:
    """Writes the accuracy on held-out scenes, and that of true drawings, as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", type=Path, default=standins.path("flux"), help="pipeline")
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
    arguments.output.write_text(report(pictures, scenes, arguments))


if __name__ == "__main__":
    main()
