"""Bundles and job lists that the parts of `scripts/prove production` render."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import Pipeline

_STEPS = 50
_OFFICIAL = {
    # Of the stand-in's tests; any valid nodes would do.
    "b10": ([0, 1, 3, 7, 14, 21, 28, 35, 42, 49], [1, 2, 1, 1, 1, 1, 1, 1, 4]),
    "b6": ([0, 4, 12, 22, 32, 42], [1, 3, 3, 3, 3]),
}


def standin_bundle(path: Path) -> Path:
    """The FLUX stand-in with schedules b2, b6, b10."""
    return _exported("standin/flux", path, side=64)


def mid_size_bundle(path: Path) -> Path:
    """A wider transformer of random weights, 17.9 M parameters, at 256 tokens; the same schedules.

    The denoising evaluations take nearly all of its time, as they do of a real model's.
    """
    checkpoint = path.with_suffix(".checkpoint")
    pipe = FluxPipeline.from_pretrained(standins.path("flux"), dtype=torch.float32)
    config = dict(pipe.transformer.config)
    shape = {"num_attention_heads": 8, "num_layers": 4, "num_single_layers": 8}
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel.from_config({**config, **shape})
    pipe.save_pretrained(checkpoint)
    return _exported(str(checkpoint), path, side=128)


def write_jobs(path: Path, count: int, schedules: Sequence[str], *, prompts: int = 60) -> Path:
    """A job list: `prompts` distinct prompts and `schedules` in turn, each job a seed of its own.

    As 60 prompts and 2 schedules come round together, a prompt keeps to one schedule, and its
    repetitions fall into different chunks.
    """
    texts = standins.prompts("evaluation", "flux")[:prompts]
    jobs = [
        {
            "id": f"j{index:04d}",
            "prompt": texts[index % len(texts)],
            "seed": index,
            "schedule": schedules[index % len(schedules)],
        }
        for index in range(count)
    ]
    path.write_text("".join(f"{json.dumps(job)}\n" for job in jobs), encoding="utf-8")
    return path


def _exported(model: str, path: Path, *, side: int) -> Path:
    exporting = stages.ExportOptions(size=(side, side), is_parity_checked=False)
    checkpoint = stages.find_model(model)
    bundle = stages.export(checkpoint, path, exporting, note=lambda _: None, is_forced=False)
    with Pipeline(bundle, threads=1, embedding_cache="off") as pipeline:
        grid, short = pipeline.grid(_STEPS), pipeline.grid(2)
    for name, (nodes, spans) in _OFFICIAL.items():
        bundle.add_schedule(bake("official", grid, nodes, spans, name=name))
    bundle.add_schedule(bake("euler", short, range(2), name="b2"))
    bundle.add_schedule(bake("euler", grid, range(0, _STEPS, 2), name="b25"))
    return path
