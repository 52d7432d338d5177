"""The bundles of the stand-ins and their plans, which the other slices use; kept between calls."""

from __future__ import annotations

import time
from collections.abc import Iterator

from scripts.gpu.bench import Bench
from scripts.gpu.record import Check, measured

NAME = "prepare"
ABOUT = "export the stand-ins, build their plans; what is there is kept"


def run(bench: Bench) -> Iterator[Check]:
    """Each stand-in for each backend; what other slices lack they make themselves."""
    for subject in bench.settings.subjects:
        yield from bench.attempt("export", lambda one=subject: _exported(bench, one), "", subject)
        for backend in bench.settings.backends:
            yield from bench.attempt(
                "plans", lambda a=backend, b=subject: _planned(bench, a, b), backend, subject
            )


def _exported(bench: Bench, subject: str) -> Check:
    begin = time.monotonic()
    bench.bundle(subject)
    return measured("export", time.monotonic() - begin, "s", "next to nothing where it was there")


def _planned(bench: Bench, backend: str, subject: str) -> Check:
    begin = time.monotonic()
    plans = bench.prepared(backend, subject).names("plans")
    return measured("plans", time.monotonic() - begin, "s", f"{len(plans)} in the bundle")
