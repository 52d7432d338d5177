"""Ways to turn nodes (and spans) into weights. One file each; all cost the same at run time.

A new method is a new module here and nothing else: modules are found, and what they call `METHOD`
(or `METHODS`, where one rule has several orders) is in the table.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.methods.base import Method


def _found() -> Iterator[Method]:
    """The methods of every module here, in the order of the modules' names."""
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{name}")
        if hasattr(module, "METHOD"):
            yield module.METHOD
        yield from getattr(module, "METHODS", ())


def _table() -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for method in _found():
        if method.name in methods:
            raise ScheduleError(
                f"two files in meancache/methods name a method {method.name!r}; rename one"
            )
        methods[method.name] = method
    return methods


METHODS: dict[str, Method] = _table()


def get_method(name: str) -> Method:
    """Return the method called `name`. Raises `ScheduleError` that lists all of them."""
    try:
        return METHODS[name]
    except KeyError:
        raise ScheduleError(
            f"unknown method {name!r}; expected one of {', '.join(METHODS)}"
        ) from None


__all__ = ["METHODS", "Method", "get_method"]
