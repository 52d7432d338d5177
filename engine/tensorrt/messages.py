"""What a build's worker says to the process that started it: a line of JSON each."""

from __future__ import annotations

import msgspec

from meancache_trt.engine.tensorrt.builder import Built

STOP = b"stop\n"
"""What the worker is told on its standard input; its end means that nobody waits any more."""


class Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The share that is done, 0 to 1."""

    share: float


class Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Something that a user should know."""

    text: str


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The name of one of the classes in `meancache_trt.errors`, and its message."""

    error: str
    message: str


Message = Progress | Said | Built | Failed
