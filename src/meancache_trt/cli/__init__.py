"""The command line. Exit status: 0 done, 1 failed with one message, 2 wrong usage."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from meancache_trt import __version__
from meancache_trt.cli.bake import bake
from meancache_trt.cli.build import build, export
from meancache_trt.cli.calibrate import calibrate
from meancache_trt.cli.demo import demo
from meancache_trt.cli.doctor import doctor
from meancache_trt.cli.evaluate import evaluate
from meancache_trt.cli.inspect import inspect
from meancache_trt.cli.plan import plan
from meancache_trt.cli.render import encode, render
from meancache_trt.cli.serve import serve
from meancache_trt.errors import MeanCacheError


class _InOrder(click.Group):
    """Lists commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of definition."""
        del ctx
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meancache-trt")
def cli() -> None:
    """Render flow-matching models with few network evaluations, inside a compiled engine.

    \b
    A first run, without any model to download:
        meancache-trt demo -o demo
    With a diffusers checkpoint:
        meancache-trt build MODEL -o model.mcb --budget 10
        meancache-trt render model.mcb --prompt "a red fox" -o pictures
    """


for command in (
    demo,
    build,
    render,
    serve,
    evaluate,
    inspect,
    doctor,
    export,
    calibrate,
    bake,
    plan,
    encode,
):
    cli.add_command(command)


_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Our progress is the only one on the screen, unless the user says otherwise."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        cli.main(arguments, prog_name="meancache-trt", standalone_mode=False)
    except MeanCacheError as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        _fail(f"this command needs {package}: pip install 'meancache-trt[cpu,export]'", 1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)


def _fail(message: str, status: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(status)
