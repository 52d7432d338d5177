"""Ways to turn nodes (and spans) into weights. One file each; all cost the same at run time.

A new method is a module with a `Method` named in `METHODS`.
"""

from __future__ import annotations

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.methods import ab2, euler, official, paper, taylor, threshold
from meancache_trt.meancache.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        euler.METHOD,
        official.METHOD,
        paper.METHOD,
        ab2.METHOD,
        *taylor.METHODS,
        threshold.METHOD,
    )
}


def get_method(name: str) -> Method:
    """Return the method called `name`. Raises `ScheduleError` that lists all of them."""
    try:
        return METHODS[name]
    except KeyError:
        raise ScheduleError(
            f"unknown method {name!r}; expected one of {', '.join(METHODS)}"
        ) from None


__all__ = ["METHODS", "Method", "get_method"]
