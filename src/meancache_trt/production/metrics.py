"""What Prometheus is told of a run: at an HTTP endpoint, or in a file that a collector reads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from meancache_trt.errors import InputError, RuntimeUnavailableError
from meancache_trt.production.watch import Show, Sight, View

LOOPBACK = "127.0.0.1"

_WRITE_EVERY_S = 5.0
"""More often than Prometheus asks by default (15 s), so that it rarely finds the same twice."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class MetricsTarget:
    """Where metrics go: a `.prom` file, or else an endpoint. Port 0 is any that is free."""

    file: Path | None = None
    host: str = LOOPBACK
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read PORT, HOST:PORT or FILE.prom. Raises `InputError` for anything else."""
        if text.endswith(".prom"):
            return cls(Path(text))
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
        is_number = port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16
        if not is_number or bool(colon) != bool(host):
            raise InputError(
                f"metrics go to a port such as 9100 or 0.0.0.0:9100, or to a file such as "
                f"night.prom; found {text!r}"
            )
        return cls(host=host or LOOPBACK, port=int(port))

    def view(self, note: Note) -> View:
        """A view that tells Prometheus; `note` is for what people should know meanwhile.

        Entering it raises `RuntimeUnavailableError` where prometheus-client is missing, and
        `InputError` where the address cannot be listened at; the first sight raises `InputError`
        where the file cannot be written.
        """
        if self.file is not None:
            return _in_file(self.file, note)
        return _at_endpoint(self.host, self.port, note)


@contextlib.contextmanager
def _at_endpoint(host: str, port: int, note: Note) -> Iterator[Show]:
    library = _import_client()
    metrics = _Metrics(library)
    try:
        server, thread = library.start_http_server(port, addr=host, registry=metrics.registry)
    except OSError as error:
        raise InputError(
            f"cannot serve metrics at {host}:{port}: {error.strerror}; give another port, or a "
            "file that ends in .prom"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    note(f"metrics at http://{shown}:{server.server_port}/metrics")
    try:
        yield metrics.show
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def _in_file(path: Path, note: Note) -> Iterator[Show]:
    library = _import_client()
    metrics = _Metrics(library)
    last: float | None = None
    has_failed = False

    def write() -> None:
        nonlocal has_failed
        try:
            library.write_to_textfile(str(path), metrics.registry)
        except OSError as error:
            message = f"cannot write metrics to {path}: {error.strerror}"
            if last is None:
                raise InputError(f"{message}; give a file in a directory that is there") from error
            if not has_failed:  # pictures matter more: the run goes on
                note(f"{message}; rendering goes on")
            has_failed = True
        else:
            has_failed = False

    def show(sight: Sight) -> None:
        nonlocal last
        metrics.show(sight)
        if last is None or time.monotonic() - last >= _WRITE_EVERY_S:
            write()
            last = time.monotonic()

    yield show
    if last is not None:
        write()


class _Metrics:
    """A collector of the latest sight, alone in a registry of its own."""

    def __init__(self, library: ModuleType) -> None:
        self._core = library.core
        self._sight: Sight | None = None
        self.registry = library.CollectorRegistry()
        self.registry.register(self)

    def show(self, sight: Sight) -> None:
        self._sight = sight

    def collect(self) -> Iterator[Any]:
        """The families, as prometheus-client asks for them."""
        sight = self._sight
        if sight is None:
            return
        found = sight.snapshot
        statuses = {
            "done": found.done,
            "failed": found.failed,
            "others": found.others,
            "earlier": found.earlier,
        }
        jobs = self._core.CounterMetricFamily(
            "meancache_jobs",
            "Jobs done and failed here, finished by other processes, and finished before.",
            labels=["status"],
        )
        for status, count in statuses.items():
            jobs.add_metric([status], count)
        yield jobs
        yield self._gauge("meancache_run_jobs", "Jobs of the run.", found.jobs)
        yield self._gauge("meancache_run_jobs_left", "Jobs that nobody has finished.", found.left)
        yield self._gauge("meancache_run_elapsed_seconds", "Time since begin.", found.elapsed_s)
        yield self._gauge(
            "meancache_pictures_per_second", "Recent pace of this process.", sight.pictures_per_s
        )
        if sight.left_s is not None:
            yield self._gauge("meancache_run_left_seconds", "Time to the end.", sight.left_s)
        yield self._by_stage(
            "meancache_stage_busy_ratio",
            "Share of the time in which the threads of a stage worked.",
            found.busy,
        )
        yield self._by_stage("meancache_queue_items", "Items before a stage.", found.waiting)

    def _gauge(self, name: str, words: str, value: float) -> Any:
        return self._core.GaugeMetricFamily(name, words, value=value)

    def _by_stage(self, name: str, words: str, values: dict[str, Any]) -> Any:
        family = self._core.GaugeMetricFamily(name, words, labels=["stage"])
        for stage, value in values.items():
            family.add_metric([stage], value)
        return family


def _import_client() -> ModuleType:
    try:
        import prometheus_client  # noqa: PLC0415  (an optional dependency)
        import prometheus_client.core  # noqa: PLC0415
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"metrics need prometheus-client ({error}); run `pip install 'meancache-trt[batch]'`, "
            "or leave --metrics out"
        ) from error
    return prometheus_client  # type: ignore[no-any-return]
