"""Of what sizes `build`, `export` and `calibrate` make pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from meancache_trt.build import picture_size
from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.cli.options import Parsed, gathered, height, width
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.shapes import PictureSize

_resolutions = click.option(
    "--resolution",
    "resolutions",
    type=Parsed("resolution", PictureSize),
    metavar="WIDTHxHEIGHT[xFRAMES]",
    multiple=True,
    help="What is rendered, instead of --height, --width and --frames; may be given several times: "
    "resolutions share graphs and weights, and the first is the default.",
)
_frames = click.option(
    "--frames",
    type=click.IntRange(min=1),
    help="Frames of a video; by default what the model's pipeline makes.",
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """--resolution, or --height, --width and --frames; a usage error where both are given."""

    resolutions: tuple[PictureSize, ...]
    height: int | None
    width: int | None
    frames: int | None

    def __post_init__(self) -> None:
        if self.resolutions and self._is_side_given:
            raise click.UsageError(
                "give --resolution, or --height, --width and --frames, but not both"
            )

    @property
    def _is_side_given(self) -> bool:
        return (self.height, self.width, self.frames) != (None, None, None)

    def of(self, checkpoint: Checkpoint, bundle: Path | None = None) -> tuple[PictureSize, ...]:
        """What is asked of a checkpoint; by default what `bundle`, if there, renders first."""
        if self.resolutions:
            return self.resolutions
        if bundle is not None and not self._is_side_given and (bundle / MANIFEST).is_file():
            return (Bundle.open(bundle).export.resolution.size,)
        return (PictureSize(*picture_size(checkpoint, self.height, self.width), self.frames),)


options = gathered("sizes", Sizes, _resolutions, height, width, _frames)
"""Give a command these options; it gets them as one `Sizes` named `sizes`."""
