"""`serve`."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import click

from meancache_trt.cli import options
from meancache_trt.cli.output import note
from meancache_trt.errors import InputError, RuntimeUnavailableError
from meancache_trt.export.text import TextPrecision
from meancache_trt.meancache.files import read_bytes
from meancache_trt.production.jobs import Limits
from meancache_trt.production.renderer import RendererOptions
from meancache_trt.production.tickets import Defaults

_LEAST_TOKEN = 16
"""Characters: fewer could be found by trying."""

_HERE = "local"


@click.command()
@options.bundle
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="A file with the token that requests have to bring; needed beyond loopback.",
)
@click.option("--token-env", metavar="NAME", help="An environment variable with the token instead.")
@click.option(
    "--schedule",
    help="For requests that name none: a name in the bundle, a number of evaluations, or a file.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Pictures of different requests that are rendered at a time.",
)
@click.option(
    "--batch-wait",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="MS",
    help="How long a picture may wait for others to be rendered with.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Pictures that wait or are rendered; more are refused with 429.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="S",
    help="Seconds in which every request is answered; one that cannot be is refused at once.",
)
@click.option(
    "--prompt-limit",
    type=click.IntRange(min=16),  # room for the renderer's own warm-up
    default=10_000,
    show_default=True,
    help="Characters of a prompt.",
)
@click.option(
    "--images-limit",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Pictures of a request.",
)
@options.backend
@options.threads
@options.embedding_cache
@options.text_precision
@click.option(
    "--ray",
    "address",
    is_flag=False,
    flag_value=_HERE,
    metavar="[ADDRESS]",
    help="Serve on Ray Serve: on a cluster at ADDRESS, or, as the last option, on this machine.",
)
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    help="With --ray: copies of the bundle in memory, on one GPU each where there are some.",
)
def serve(
    bundle: Path,
    host: str,
    port: int,
    token_file: Path | None,
    token_env: str | None,
    schedule: str | None,
    max_batch: int,
    batch_wait: float,
    queue: int,
    deadline: float,
    prompt_limit: int,
    images_limit: int,
    backend: str,
    threads: int,
    embedding_cache: str | None,
    text_precision: TextPrecision,
    address: str | None,
    replicas: int | None,
) -> None:
    """Answer requests for pictures over HTTP, as OpenAI's images API does.

    POST /v1/images/generations takes what OpenAI's clients send, and /openapi.json says what else.
    SIGTERM stops taking requests, finishes those in flight and exits with status 0.
    """
    if replicas is not None and address is None:
        raise click.UsageError("--replicas are those of --ray")
    if address is not None and port == 0:
        raise click.UsageError("--ray needs a --port, since each of its nodes listens on it")
    token = _token(token_file, token_env)
    if token is None and not _is_loopback(host):
        raise click.UsageError(
            f"on {host} others can reach the service; give --token-file or --token-env"
        )
    if token is None and address not in (None, _HERE):
        # Where Ray Serve runs already, its proxies listen where they were told to then.
        raise click.UsageError(
            "on a cluster others may reach the service; give --token-file or --token-env"
        )
    try:
        from meancache_trt.production import hosting, service_wire  # noqa: PLC0415
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"a service needs more packages ({error}); pip install 'meancache-trt[serve]'"
        ) from error
    hosted = hosting.Hosting(
        bundle=bundle,
        backend=backend,
        threads=threads,
        embedding_cache=embedding_cache,
        text_precision=text_precision,
        defaults=Defaults(schedule=schedule),
        options=RendererOptions(capacity=queue, max_batch=max_batch, batch_wait_ms=batch_wait),
        limits=service_wire.ServiceLimits(
            job=Limits(prompt_characters=prompt_limit),
            images=min(images_limit, queue),  # more could never be taken on at once
            requests=max(queue, service_wire.ServiceLimits().requests),
            request_s=deadline,
        ),
        token=token,
    )
    if address is None:
        hosting.serve_here(hosted, host, port, note)
        return
    from meancache_trt.production.ray_serve import serve_on_ray  # noqa: PLC0415

    serve_on_ray(
        hosted,
        host,
        port,
        note,
        address=None if address == _HERE else address,
        replicas=replicas or 1,
    )


def _token(file: Path | None, variable: str | None) -> str | None:
    """The token of a file or an environment variable, and never of the command line."""
    if file is not None and variable is not None:
        raise click.UsageError("give --token-file or --token-env, but not both")
    if file is None and variable is None:
        return None
    where = str(file) if file is not None else f"the environment variable {variable}"
    content = read_bytes(file) if file is not None else os.environb.get(os.fsencode(variable or ""))
    if content is None:
        raise InputError(f"expected a token in {where}, found no such variable; set it")
    token = content.strip().decode("ascii", errors="replace")
    if len(token) < _LEAST_TOKEN or not all("!" <= character <= "~" for character in token):
        raise InputError(
            f"expected a token of at least {_LEAST_TOKEN} letters, digits or signs of ASCII in "
            f"{where}, found none; `openssl rand -hex 32` makes one"
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
