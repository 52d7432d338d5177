"""The service on Ray Serve, which does HTTP, replicas and their restarts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from fastapi import FastAPI

from meancache_trt.errors import RuntimeUnavailableError
from meancache_trt.production.hosting import Hosting, ending_at_sigterm, opened_app, serving
from meancache_trt.production.ray_cluster import connect

try:
    import ray
    from ray import serve
except ImportError as missing:
    raise RuntimeUnavailableError(
        f"Ray is not installed ({missing}); pip install 'meancache-trt[ray]'"
    ) from missing

_NAME = "meancache-trt"


def deployment(hosting: Hosting, *, replicas: int = 1, gpus: float = 0) -> serve.Application:
    """An application of `replicas`, each of which loads the bundle and has `gpus` of its own.

    The bundle is to be found under its path on every node that has replicas.
    """

    def build() -> FastAPI:  # in the replica: threads and engines do not travel
        opened = contextlib.ExitStack()

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            del app
            with opened:
                yield

        return opened.enter_context(opened_app(hosting, lifespan))

    deployed = serve.deployment(
        serve.ingress(build)(),
        name=_NAME,
        num_replicas=replicas,
        max_ongoing_requests=hosting.limits.requests,
        graceful_shutdown_timeout_s=hosting.limits.request_s,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )
    return deployed.bind()


@contextlib.contextmanager
def served(
    hosting: Hosting, *, host: str, port: int, address: str | None = None, replicas: int = 1
) -> Iterator[None]:
    """Serve on Ray; at the end of the block the requests that it has are finished, and it stops.

    `address` is a cluster's, whose other services stay; None starts Ray on this machine alone,
    unless this process has already done so. Replicas have one GPU each where there are some.
    Raises `RuntimeUnavailableError` where Ray cannot be joined or cannot start them.
    """
    if not ray.is_initialized():
        connect(address)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        serve.start(http_options={"host": host, "port": port})
        _deploy(deployment(hosting, replicas=replicas, gpus=gpus))
        try:
            yield
        finally:
            serve.delete(_NAME)  # waits for requests; `shutdown` alone would cut them off
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()


def _deploy(application: serve.Application) -> None:
    try:
        serve.run(application, name=_NAME, route_prefix="/")
    except RuntimeError as error:
        raise RuntimeUnavailableError(
            f"Ray could not start the service ({error}); its logs lie below its session directory, "
            "and `meancache-trt serve` without --ray tells what a bundle lacks"
        ) from error


def serve_on_ray(
    hosting: Hosting,
    host: str,
    port: int,
    note: Callable[[str], None],
    *,
    address: str | None = None,
    replicas: int = 1,
) -> None:
    """Serve on Ray until SIGTERM, which ends it by `SystemExit` with status 0."""
    with (
        served(hosting, host=host, port=port, address=address, replicas=replicas),
        ending_at_sigterm(),  # inside, since Ray has a handler of its own
    ):
        note(serving(hosting, host, port))
        threading.Event().wait()
