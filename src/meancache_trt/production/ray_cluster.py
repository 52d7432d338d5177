"""A Ray cluster: joining or starting one, and what room it has for actors."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meancache_trt.errors import InputError, RuntimeUnavailableError

_INIT_DEATHS = 8
"""Actors that may die one after the other while they open the bundle, before the run ends: more
than bad luck, as where memory is too small for it."""

_STORE_BYTES = 128 << 20
"""Object store of a local Ray, beside the jobs: it holds numbers. Ray takes no less than 75 MiB."""

_PORT_S = 10.0
"""How long the port of a cluster may take to answer: longer than any network that can carry it."""


@dataclass(frozen=True)
class Cluster:
    """Where a run goes: the address of a Ray cluster, or None for one of its own on this machine.

    An address is what `ray.init` takes: "auto", HOST:PORT or ray://HOST:PORT. `actors` is how many
    to use: by default one for each GPU, or where there is none as many as the cores suffice for.
    """

    address: str | None = None
    actors: int | None = None


@dataclass(frozen=True)
class ActorPool:
    """How many actors, what Ray keeps free for each, and the threads of a graph."""

    actors: int
    threads: int
    cores: int
    has_gpus: bool = False

    @property
    def resources(self) -> dict[str, float]:
        """As arguments of Ray's remote functions."""
        return {"num_gpus": 1} if self.has_gpus else {"num_cpus": self.cores}


def import_ray() -> Any:
    """The package, with `ray.data`. Raises `RuntimeUnavailableError` that names the extra."""
    try:
        import ray  # noqa: PLC0415  the extra
        import ray.data  # noqa: PLC0415
    except ImportError as error:
        raise RuntimeUnavailableError(
            "a run on Ray needs the package ray, which is not installed; run "
            "`pip install 'meancache-trt[ray]'`"
        ) from error
    return ray


@contextlib.contextmanager
def joined_cluster(address: str | None, content: bytes) -> Iterator[Any]:
    """Yield a reference to `content` in the object store of the cluster at `address`.

    A Ray that this process has is used, whatever its address, and left as it is. Otherwise one is
    joined or, for None, started on this machine, and shut down at the end. Raises
    `RuntimeUnavailableError` where none can be joined.
    """
    ray = import_ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        with _handler_kept():
            connect(address, len(content))
    try:
        yield ray.put(content)
    finally:
        if is_ours:
            ray.shutdown()


def connect(address: str | None, content_bytes: int = 0) -> None:
    """Join the cluster at `address`, or start one here with room for so much; both quietly.

    Raises `RuntimeUnavailableError` where none can be joined.
    """
    ray = import_ray()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        store_bytes = _STORE_BYTES + 2 * content_bytes
        ray.init("local", include_dashboard=False, object_store_memory=store_bytes, **quiet)
        return
    try:
        _check_port(address)
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"cannot join a Ray cluster at {address!r} ({last_line(error)}); check that it runs "
            "and takes this process's token, or give no address to use this machine alone"
        ) from error


def _check_port(address: str) -> None:
    """Raise `OSError` where nobody listens, for which Ray would wait several minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PORT_S).close()


@contextlib.contextmanager
def _handler_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which `ray.init` replaces in the main thread."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def quiet_data_context() -> Iterator[None]:
    """Ray Data's settings for a run; those of this process come back."""
    data = import_ray().data
    logger = logging.getLogger("ray.data")
    context, level = data.DataContext.get_current().copy(), logger.level
    logger.setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a share may take hours
    context.max_consecutive_actor_init_deaths = _INIT_DEATHS
    try:
        with data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def actor_pool(
    nodes: Sequence[Mapping[str, Any]], cluster: Cluster, threads: int, workers: int
) -> ActorPool:
    """One actor for each GPU of `ray.nodes()`, or as many as the cores suffice for.

    An actor has `workers` threads that denoise, with `threads` each; 0 means all that there are.
    Raises `InputError` where there is no room for one.
    """
    found = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in found)
    cores = [int(node.get("CPU", 0)) for node in found if node.get("CPU", 0) >= 1]
    if gpus:
        return ActorPool(cluster.actors or gpus, threads, 0, has_gpus=True)
    if not cores:
        raise InputError(
            "the Ray cluster has no cores and no GPUs; start nodes with `ray start --num-cpus N`"
        )
    each = threads * workers or max(1, min(cores) // -(-(cluster.actors or 1) // len(cores)))
    actors = cluster.actors or sum(count // each for count in cores)
    if max(cores) < each:
        raise InputError(
            f"an actor needs {each} cores, the largest node of the Ray cluster has {max(cores)}; "
            "give fewer --threads or --workers"
        )
    return ActorPool(actors, threads or max(1, each // workers), each)


def last_line(error: Exception) -> str:
    """What an error of Ray says, without the traces before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip(" .")
