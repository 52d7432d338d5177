"""What a service tells Prometheus, in a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meancache_trt.production.renderer import RendererStatus

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"

_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""From a stand-in's picture to a minute's video, each about twice the one before."""

NOBODY_LISTENS = 499
"""nginx's number for a client that went away before its answer."""


class Metrics:
    """Requests by path and status, their time, and what the renderer is at."""

    def __init__(self, paths: Collection[str], status: Callable[[], RendererStatus]) -> None:
        self._paths, self._status = frozenset(paths), status
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "meancache_requests",
            "Requests by path and status.",
            ("path", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "meancache_request_seconds",
            "Time of requests that were answered with pictures.",
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._waiting = Gauge(
            "meancache_queue_jobs", "Jobs that wait for their turn.", registry=self._registry
        )
        self._rendering = Gauge(
            "meancache_rendering_jobs", "Jobs that are being rendered.", registry=self._registry
        )
        self._busy = Gauge(
            "meancache_stage_busy_share",
            "Share of the time for which a stage has been at work.",
            ("stage",),
            registry=self._registry,
        )

    def observe(self, path: str, status: int, seconds: float, *, is_rendered: bool) -> None:
        """Count a request; a path that nobody serves counts as one with all such."""
        known = path if path in self._paths else "other"
        self._requests.labels(known, str(status)).inc()
        if is_rendered:
            self._seconds.observe(seconds)

    def encode(self) -> bytes:
        """All of it in Prometheus' text format."""
        status = self._status()
        self._waiting.set(status.waiting)
        self._rendering.set(status.rendering)
        for stage, share in status.busy.items():
            self._busy.labels(stage).set(share)
        return bytes(generate_latest(self._registry))


class Counted:
    """An ASGI app whose requests are counted."""

    def __init__(self, app: ASGIApp, metrics: Metrics, rendering_path: str) -> None:
        self._app, self._metrics, self._rendering_path = app, metrics, rendering_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = NOBODY_LISTENS, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            path, seconds = scope["path"], time.perf_counter() - start
            is_rendered = path == self._rendering_path and status == 200
            self._metrics.observe(path, status, seconds, is_rendered=is_rendered)
