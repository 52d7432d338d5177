"""What `build` and `export` ask of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import click

from meancache_trt.build import ExportOptions
from meancache_trt.cli.options import gathered, guidance_scale_2
from meancache_trt.shapes import PictureSize, Range

_weights = click.option(
    "--weights",
    type=click.Choice(["link", "copy"]),
    default="link",
    show_default=True,
    help="link: share the checkpoint's files; copy: a bundle that travels.",
)
_precision = click.option(
    "--precision",
    "precisions",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    multiple=True,
    help="Graphs beside the float32 one; may be given several times. By default bfloat16 where the "
    "checkpoint is stored so.",
)
_skip_parity = click.option(
    "--skip-parity", is_flag=True, help="Do not compare the graphs with diffusers."
)
_parity_memory = click.option(
    "--parity-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory that the comparison may take; by default what is free. A network that does not "
    "fit is compared by the first of each kind of block.",
)


@dataclass(frozen=True, kw_only=True)
class Exporting:
    """These options by their names; `parity_memory` is in GiB."""

    weights: Literal["link", "copy"]
    precisions: tuple[str, ...]
    skip_parity: bool
    parity_memory: float | None
    guidance_scale_2: float | None

    def of(
        self, sizes: Sequence[PictureSize], batch: Range | None, text_tokens: int | None
    ) -> ExportOptions:
        """What to export for pictures of these sizes."""
        first, *further = sizes
        memory = self.parity_memory
        return ExportOptions(
            size=(first.height, first.width),
            frames=first.frames,
            further_sizes=tuple(further),
            batch=batch,
            text_tokens=text_tokens,
            weights=self.weights,
            precisions=self.precisions or None,
            is_parity_checked=not self.skip_parity,
            parity_bytes=None if memory is None else int(memory * 2**30),
            guidance_scale_2=self.guidance_scale_2,
        )


options = gathered(
    "exporting",
    Exporting,
    _weights,
    _precision,
    _skip_parity,
    _parity_memory,
    guidance_scale_2,
)
"""Give a command these options; it gets them as one `Exporting` named `exporting`."""
