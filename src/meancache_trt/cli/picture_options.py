"""Options that both ways of `render` share: how the bundle is opened, what pictures are like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from meancache_trt.cli import options
from meancache_trt.export.text import TextPrecision
from meancache_trt.media.formats import OutputFormat
from meancache_trt.production import ray_data
from meancache_trt.production.tickets import Defaults, Settings
from meancache_trt.render import Pipeline, load


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a bundle is opened. `threads` is of one graph, 0 where nobody said."""

    backend: str
    threads: int
    embedding_cache: str | None
    text_precision: TextPrecision

    def open(self, bundle: Path, *, threads: int, keep_encoders: bool) -> Pipeline:
        """Open it; see `load`."""
        return load(
            bundle,
            backend=self.backend,
            threads=threads,
            embedding_cache=self.embedding_cache,
            text_precision=self.text_precision,
            keep_encoders=keep_encoders,
        )

    def elsewhere(self, bundle: Path) -> ray_data.Opening:
        """How the actors of a run open it, each with one thread where nobody said."""
        return ray_data.Opening(
            bundle,
            backend=self.backend,
            threads=self.threads or 1,
            embedding_cache=self.embedding_cache,
            text_precision=self.text_precision,
        )


formats = click.option(
    "--format",
    "formats",
    type=options.Parsed("format", OutputFormat),
    multiple=True,
    metavar="NAME[:QUALITY]",
    help="png, jpeg, webp, mp4 or latents, with a quality from 1 to 100 where something is lost; "
    "may be given several times. By default png, and for videos of --prompts mp4.",
)
opening = options.gathered(
    "opening",
    Opening,
    options.backend,
    options.threads,
    options.embedding_cache,
    options.text_precision,
)
settings = options.gathered(
    "settings",
    Settings,
    click.option(
        "--noise",
        type=click.Choice(["philox", "torch"]),
        default="philox",
        show_default=True,
        help="philox: the same in every host; torch: as diffusers draws it for the seed.",
    ),
    click.option(
        "--vae-tiling",
        is_flag=True,
        help="Decode large pictures in blended tiles, as diffusers' enable_tiling: in less memory.",
    ),
)
defaults = options.gathered(
    "defaults",
    Defaults,
    click.option(
        "--negative-prompt",
        default="",
        help="What to steer away from, for models with classifier-free guidance; empty by default.",
    ),
    click.option(
        "--schedule",
        help="A name in the bundle, a number of evaluations, or a schedule file. By default the "
        "bundle's calibrated schedule with most evaluations.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Seed of the initial noise."
    ),
    options.guidance_scale,
    options.height,
    options.width,
    click.option("--frames", type=click.IntRange(min=1), help="Frames of a video."),
)
"""Of every picture; of those of a job file, where the job does not say."""
