"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, TypeVar, get_args

import click

from meancache_trt.engine.select import BACKENDS
from meancache_trt.errors import InputError
from meancache_trt.export.text import TextPrecision
from meancache_trt.shapes import PictureSize, Range

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
backend = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What runs the graphs; `meancache-trt doctor` lists them.",
)
threads = click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="Cores that one graph may use; 0 means all.",
)
height = click.option("--height", type=click.IntRange(min=1), help="Picture height in pixels.")
width = click.option("--width", type=click.IntRange(min=1), help="Picture width in pixels.")
frames = click.option(
    "--frames",
    type=click.IntRange(min=1),
    help="Frames of a video; by default what the model's pipeline makes.",
)
steps = click.option(
    "--steps",
    type=int,
    default=50,
    show_default=True,
    help="Steps of the model's own full integration.",
)
guidance_scale = click.option(
    "--guidance-scale",
    type=float,
    help="Guidance scale; by default the schedule's, or the model's.",
)
force = click.option("--force", is_flag=True, help="Redo what is already there.")
model = click.argument("model")
bundle = click.argument("bundle", type=click.Path(path_type=Path))


embedding_cache = click.option(
    "--embedding-cache",
    metavar="DIR|off",
    help="Where encoded prompts are kept; by default the user's cache directory.",
)
text_precision = click.option(
    "--text-precision",
    type=click.Choice(get_args(TextPrecision)),
    default="float32",
    show_default=True,
    help="checkpoint: torch loads the text encoders in their stored dtype, which takes less memory "
    "and rounds.",
)


class _FromText(Protocol):
    @classmethod
    def parse(cls, text: str) -> Self: ...


Parsable = TypeVar("Parsable", bound=_FromText)


class NumberList(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them, such as 0,1,3,7."""

    name = "numbers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse; a usage error where something else than numbers stands there."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0,1,3,7", param, ctx)


NUMBERS = NumberList()


class NameList(click.ParamType[tuple[str, ...]]):
    """Names with commas between them, such as b10,b15."""

    name = "names"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split; a usage error where a name is empty."""
        if isinstance(value, tuple):
            return value
        names = tuple(part.strip() for part in str(value).split(","))
        if not all(names):
            self.fail(f"{value!r} is not a list of names such as b10,b15", param, ctx)
        return names


NAMES = NameList()


class Parsed(click.ParamType[Parsable]):
    """A type with a `parse` of its own, whose message becomes a usage error."""

    def __init__(self, name: str, kind: type[Parsable]) -> None:
        self.name, self._kind = name, kind

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Parsable:
        """Parse; a usage error where that is refused."""
        if isinstance(value, self._kind):
            return value
        try:
            return self._kind.parse(str(value))
        except InputError as error:
            self.fail(str(error), param, ctx)


resolutions = click.option(
    "--resolution",
    "resolutions",
    type=Parsed("resolution", PictureSize),
    metavar="WIDTHxHEIGHT[xFRAMES]",
    multiple=True,
    help="What is rendered, instead of --height, --width and --frames; may be given several times: "
    "resolutions share graphs and weights, and the first is the default.",
)
batch = click.option(
    "--batch",
    type=Parsed("range", Range),
    metavar="MIN/OPT/MAX",
    help="Pictures at a time that plans are to be made for; 1/1/1 by default. Backends without "
    "plans render any batch.",
)


def check_one_way(
    resolutions: Sequence[PictureSize], height: int | None, width: int | None, frames: int | None
) -> None:
    """Raise a usage error where --resolution meets one of the options that it replaces."""
    if resolutions and (height, width, frames) != (None, None, None):
        raise click.UsageError("give --resolution, or --height, --width and --frames, but not both")
