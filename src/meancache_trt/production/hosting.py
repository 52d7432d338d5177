"""From a bundle to its service, and to uvicorn in this process."""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.types import Lifespan

from meancache_trt.errors import InputError
from meancache_trt.export.text import TextPrecision
from meancache_trt.production.renderer import Renderer, RendererOptions
from meancache_trt.production.service import GENERATIONS, make_app
from meancache_trt.production.service_wire import Offer, ServiceLimits
from meancache_trt.production.tickets import Defaults, Settings
from meancache_trt.render import load

_CONNECTIONS = 4
"""Connections for each request that may be under way: clients keep some open between requests.
Beyond, uvicorn answers 503 without reading on."""


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """What a service is made of, as `load`, `Renderer` and `make_app` say; it can be pickled."""

    bundle: Path
    backend: str = "auto"
    threads: int = 0
    embedding_cache: str | None = None
    text_precision: TextPrecision = "float32"
    settings: Settings = field(default_factory=Settings)
    defaults: Defaults = field(default_factory=Defaults)
    options: RendererOptions = field(default_factory=RendererOptions)
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    token: str | None = None


@contextlib.contextmanager
def opened_app(hosting: Hosting, lifespan: Lifespan[FastAPI] | None = None) -> Iterator[FastAPI]:
    """Load and warm up a bundle, and its service over it.

    Raises as `load` and `Renderer` do.
    """
    with (
        load(
            hosting.bundle,
            backend=hosting.backend,
            threads=hosting.threads,
            embedding_cache=hosting.embedding_cache,
            text_precision=hosting.text_precision,
        ) as pipeline,
        Renderer(
            pipeline,
            settings=hosting.settings,
            defaults=hosting.defaults,
            limits=hosting.limits.job,
            options=hosting.options,
        ) as renderer,
    ):
        offer = Offer.of(pipeline.bundle)
        yield make_app(renderer, offer, hosting.limits, hosting.token, lifespan)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 is any free one. Raises `InputError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen on {host}, port {port}: {error}; choose another --port or --host"
        ) from error


def serve_here(hosting: Hosting, host: str, port: int, note: Callable[[str], None]) -> None:
    """Serve in this process; ends by `SystemExit` at SIGTERM, when what is in flight is finished.

    `note` is told where. Raises `InputError` where the port is taken, and as `opened_app` does.
    """
    with ending_at_sigterm(), listen(host, port) as listening, opened_app(hosting) as app:
        config = uvicorn.Config(
            app,
            http="h11",  # bounds the headers that it keeps
            ws="none",
            lifespan="off",
            limit_concurrency=_CONNECTIONS * hosting.limits.requests,
            log_config=None,
            access_log=False,
            server_header=False,
            # A client that stops reading its answer must not keep the service from ending.
            timeout_graceful_shutdown=math.ceil(hosting.limits.request_s + hosting.limits.body_s),
        )
        note(serving(hosting, host, listening.getsockname()[1]))
        uvicorn.Server(config).run([listening])


def serving(hosting: Hosting, host: str, port: int) -> str:
    """Where what is served, for people."""
    address = f"[{host}]" if ":" in host else host
    asks = "asks for the token" if hosting.token else "asks for no token"
    return f"serving {hosting.bundle} on http://{address}:{port}{GENERATIONS}, which {asks}"


@contextlib.contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """SIGTERM ends the block by `SystemExit` with status 0, also where uvicorn hands it on."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
