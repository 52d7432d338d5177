"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, get_args

import click

from meancache_trt.calibration.target import DEFAULT_CONFIDENCE, Goal
from meancache_trt.engine.select import BACKENDS
from meancache_trt.errors import InputError
from meancache_trt.export.text import TextPrecision
from meancache_trt.shapes import Range

Command = Callable[..., None]
Decorator = Callable[[Command], Command]


def gathered(name: str, gather: Callable[..., object], *given: Decorator) -> Decorator:
    """Options that a command gets as one argument `name`: what `gather` makes of their values.

    `gather`, such as a frozen dataclass, has a parameter for each of the options and no others.
    """
    parameters = inspect.signature(gather).parameters

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_gathered(**values: Any) -> None:
            own = {parameter: values.pop(parameter) for parameter in parameters}
            command(**{name: gather(**own)}, **values)

        decorated: Command = with_gathered
        for option in reversed(given):
            decorated = option(decorated)
        return decorated

    return decorate


class NumberList(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them, such as `example`."""

    name = "numbers"

    def __init__(self, example: str = "0,1,3,7") -> None:
        self._example = example

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse; a usage error where something else than numbers stands there."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as {self._example}", param, ctx)


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
NUMBERS = NumberList()
BUDGETS = NumberList("10 or 15,10")


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
steps = click.option(
    "--steps",
    type=int,
    default=50,
    show_default=True,
    help="Steps of the model's own full integration.",
)
target_psnr = click.option(
    "--target-psnr",
    type=float,
    metavar="DB",
    help="Instead of --budget: the smallest budget whose pictures are this close to those of all "
    "steps, on average or, with --percentile, all but so many in a hundred.",
)
percentile = click.option(
    "--percentile",
    type=float,
    metavar="P",
    help="With --target-psnr: P in a hundred pictures may be below it, such as 5.",
)
confidence = click.option(
    "--confidence",
    type=float,
    metavar="P",
    help="With --target-psnr: how probable it is to be that further prompts reach it; by default "
    f"{DEFAULT_CONFIDENCE}.",
)
guidance_scale = click.option(
    "--guidance-scale",
    type=float,
    help="Guidance scale; by default the schedule's, or the model's.",
)
guidance_scale_2 = click.option(
    "--guidance-scale-2",
    type=float,
    help="Guidance scale of the second transformer, where the model has one; by default the "
    "first one's.",
)
force = click.option("--force", is_flag=True, help="Redo what is already there.")
model = click.argument("model")
loras = click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="A LoRA to merge into the transformer, in diffusers' or Kohya's names; given several "
    "times, they add up.",
)
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


batch = click.option(
    "--batch",
    type=Parsed("range", Range),
    metavar="MIN/OPT/MAX",
    help="Pictures at a time that plans are to be made for; 1/1/1 by default. Backends without "
    "plans render any batch.",
)


text_tokens = click.option(
    "--text-tokens", type=click.IntRange(min=1), help="Text length; by default the pipeline's."
)


def wanted_of(
    budgets: Sequence[tuple[int, ...]],
    target_psnr: float | None,
    percentile: float | None,
    confidence: float | None,
    default: tuple[int, ...],
) -> tuple[int, ...] | Goal:
    """What --budget or --target-psnr ask for; a usage error where both do."""
    if target_psnr is None:
        if (percentile, confidence) != (None, None):
            raise click.UsageError("--percentile and --confidence are those of --target-psnr")
        return tuple(budget for given in budgets for budget in given) or default
    if budgets:
        raise click.UsageError("give --budget or --target-psnr, but not both")
    return Goal(target_psnr, percentile, DEFAULT_CONFIDENCE if confidence is None else confidence)
