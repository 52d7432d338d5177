"""What a way of rendering is here: a name, its settings, and how a pipeline is put under it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from scripts.rivals.subject import Subject


@dataclass(frozen=True)
class Rival:
    """One setting of one method.

    `applied(subject)` puts it on the pipeline for the length of a `with`, and gives the number of
    steps that the pipeline is to be asked for.
    """

    method: str
    setting: str
    applied: Callable[[Subject], AbstractContextManager[int]]
