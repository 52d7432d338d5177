"""A Wan pipeline of diffusers beside its bundle, and one rendering by each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from diffusers import WanPipeline
from numpy.typing import NDArray

from meancache_trt.bundle import Bundle
from meancache_trt.calibration.recording import scheduler_replaced
from meancache_trt.cli import cli
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.render import Pipeline

HEIGHT, WIDTH, FRAMES, TEXT_TOKENS = 32, 48, 5, 12  # of the shared export
STEPS, SCALE, SCALE_2, SEED = 10, 4.0, 3.0, 3
PROMPT, OTHER, NEGATIVE = "a red dog", "two cats on a mat", "blurry"

LATENT_TOLERANCE = 3e-5
"""Float32 sums in another order, over 10 evaluations of values near 1; measured 5e-6."""


@dataclass(frozen=True)
class Subject:
    """A diffusers pipeline and the bundle of its checkpoint, open."""

    diffusers: WanPipeline
    bundle: Bundle
    pipeline: Pipeline

    @property
    def options(self) -> dict[str, Any]:
        """The second guidance scale, which the bundle has."""
        scale = self.bundle.export.second_guidance_scale
        return {} if scale is None else {"guidance_scale_2": scale}

    def schedule(self, method: str = "euler", nodes: Any = range(STEPS)) -> Schedule:
        return bake(method, self.pipeline.grid(STEPS), nodes)


def exported(
    pipeline: WanPipeline, directory: Path, *options: str, width: int = WIDTH
) -> tuple[Path, Bundle]:
    """A checkpoint and its bundle, made as a user would and compared with diffusers."""
    folder, output = directory / "tiny", directory / "tiny.mcb"
    pipeline.save_pretrained(folder)
    sizes = {"height": HEIGHT, "width": width, "frames": FRAMES, "text-tokens": TEXT_TOKENS}
    given = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    done = CliRunner().invoke(cli, ["export", str(folder), "-o", str(output), *given, *options])
    assert done.exit_code == 0, done.output
    return folder, Bundle.open(output)


def diffusers_video(subject: Subject, **changes: Any) -> NDArray[np.float32]:
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "guidance_scale": SCALE,
        "num_inference_steps": STEPS,
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "max_sequence_length": TEXT_TOKENS,
        "generator": torch.Generator("cpu").manual_seed(SEED),
        "output_type": "latent",
        **subject.options,
        **changes,
    }
    return np.asarray(subject.diffusers(**arguments).frames)[0]


def our_latent(subject: Subject, schedule: Schedule, **changes: Any) -> NDArray[np.float32]:
    arguments = {"negative_prompt": NEGATIVE, "guidance_scale": SCALE, "seed": SEED, **changes}
    (found,) = subject.pipeline.render([PROMPT], schedule=schedule, noise="torch", **arguments)
    return found.latent


def with_scheduler(subject: Subject, schedule: Schedule) -> NDArray[np.float32]:
    """The diffusers pipeline with our scheduler."""
    stock = subject.diffusers.scheduler
    scheduler = MeanCacheScheduler.from_schedule(schedule, stock)
    with scheduler_replaced(subject.diffusers, scheduler):
        return diffusers_video(subject)
