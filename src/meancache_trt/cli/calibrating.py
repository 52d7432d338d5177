"""What `build` and `calibrate` record of a checkpoint, and which schedules they bake from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from meancache_trt.build import default_prompts
from meancache_trt.calibration.baking import DEFAULT_METHOD, bakeable_methods
from meancache_trt.calibration.target import Goal
from meancache_trt.cli.options import (
    BUDGETS,
    confidence,
    gathered,
    percentile,
    steps,
    target_psnr,
    wanted_of,
)
from meancache_trt.cli.render import read_prompts
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.meancache.schedule import FITTED
from meancache_trt.record import RecordOptions
from meancache_trt.shapes import PictureSize


class ScaleOrRange(click.ParamType[float | tuple[float, float]]):
    """A guidance scale such as 3.5, or a range of them such as 2:6."""

    name = "scale"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | tuple[float, float]:
        """Parse; a usage error where something else stands there."""
        try:
            low, *high = (float(part) for part in str(value).split(":"))
        except ValueError:
            self.fail(f"{value!r} is no scale such as 3.5, and no range such as 2:6", param, ctx)
        if not high:
            return low
        if len(high) > 1 or not low < high[0]:
            self.fail(f"{value!r} is no range such as 2:6, the lower scale first", param, ctx)
        return low, high[0]


_guidance_scale = click.option(
    "--guidance-scale",
    type=ScaleOrRange(),
    metavar="SCALE|LOW:HIGH",
    help="Guidance scale, by default the model's. With LOW:HIGH the schedules serve all scales "
    "between: elsewhere than at its own a calibrated schedule can be worse than none.",
)
_samples = click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Pictures to record; 8 to 16 suffice.",
)
_prompts = click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path),
    help="Prompts to record, one a line; a packaged list by default.",
)
_budgets = click.option(
    "--budget",
    "budgets",
    type=BUDGETS,
    multiple=True,
    help="Network evaluations an image; several with commas, or given several times.",
)
_method = click.option(
    "--method",
    type=click.Choice(bakeable_methods()),
    default=DEFAULT_METHOD,
    show_default=True,
    help="How nodes are chosen and skipped steps estimated; the default is the best measured.",
)


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """These options by their names; `file` has prompts, `guidance_scale` may be a range."""

    steps: int
    guidance_scale: float | tuple[float, float] | None
    budgets: tuple[tuple[int, ...], ...]
    target_psnr: float | None
    percentile: float | None
    confidence: float | None
    method: str
    samples: int
    file: Path | None

    def wanted(self, default: tuple[int, ...]) -> tuple[int, ...] | Goal:
        """What --budget or --target-psnr ask for; a usage error where that cannot be baked."""
        wanted = wanted_of(
            self.budgets, self.target_psnr, self.percentile, self.confidence, default
        )
        if wanted and self.method == FITTED and self.samples < 2:
            raise click.UsageError(
                "fitted schedules hold samples out and need at least 2; give more --samples, 16 "
                "are usual, or another --method"
            )
        return wanted

    def recording(
        self,
        checkpoint: Checkpoint,
        size: PictureSize,
        text_tokens: int | None,
        wanted: tuple[int, ...] | Goal,
    ) -> RecordOptions:
        """What to record of a checkpoint at one size, for the schedules that are wanted."""
        scale = self.guidance_scale
        return RecordOptions(
            size=(size.height, size.width),
            frames=size.frames,
            prompts=self._prompts(checkpoint),
            steps=self.steps,
            samples=self.samples,
            guidance_scale=None if isinstance(scale, tuple) else scale,
            guidance_range=scale if isinstance(scale, tuple) else None,
            text_tokens=text_tokens,
            budgets=() if isinstance(wanted, Goal) else wanted,
        )

    def _prompts(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Those of --prompts, or those that the checkpoint is calibrated on by default."""
        return default_prompts(checkpoint) if self.file is None else tuple(read_prompts(self.file))


_STEPS = (steps, _guidance_scale)
_WANTED = (_budgets, target_psnr, percentile, confidence, _method)
_SAMPLES = (_samples, _prompts)

options_of_build = gathered("calibrating", Calibrating, *_STEPS, *_WANTED, *_SAMPLES)
options_of_calibrate = gathered("calibrating", Calibrating, *_STEPS, *_SAMPLES, *_WANTED)
"""Give a command these options; it gets them as one `Calibrating` named `calibrating`."""
