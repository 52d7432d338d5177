"""Draws the picture on the card of the stand-in's LoRA: above without it, below with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import judge
import text_models
import torch
from PIL import Image

from meancache_trt import standins

PROMPTS = (
    "large plain magenta circle center gray",
    "a small striped magenta star on the left, on black",
    "a big magenta heart on the right, on a mint background",
    "a dotted magenta ring in the middle of a brown picture",
    "large plain red circle center gray",
    "a white moon on the right, on navy",
    "a large striped yellow star on navy",
    "a tiny dotted magenta cross on pink",
)
STEPS, GUIDANCE, PIXELS, SIDE = 20, 3.5, 64, 128


def row(pipeline: Any) -> Image.Image:
    """The prompts' pictures side by side, the seed of each its place."""
    drawn = Image.new("RGB", (SIDE * len(PROMPTS), SIDE))
    for seed, prompt in enumerate(PROMPTS):
        picture = pipeline(
            prompt,
            height=PIXELS,
            width=PIXELS,
            max_sequence_length=text_models.MAX_TOKENS,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        drawn.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (SIDE * seed, 0))
    return drawn


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "output", type=Path, nargs="?", default="docs/images/standin-flux-magenta.png"
    )
    output = parser.parse_args().output
    pipeline = judge.load(standins.path("flux"))
    pipeline.set_progress_bar_config(disable=True)
    without = row(pipeline)
    lora = standins.lora_path("flux_magenta")
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    both = Image.new("RGB", (without.width, 2 * SIDE))
    both.paste(without, (0, 0))
    both.paste(row(pipeline), (0, SIDE))
    both.save(output)


if __name__ == "__main__":
    main()
