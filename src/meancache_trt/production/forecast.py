"""How long jobs will take, from how long jobs have taken.

A schedule is B evaluations of one network, or of two of one architecture, whatever the prompt and
seed, so its loop takes B times as long as one evaluation; what comes before and after the loop does
not depend on it at all. So a few measurements on a warm machine predict every schedule.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from meancache_trt.production.tickets import Ticket
from meancache_trt.shapes import PictureSize

REMEMBERED = 15
"""Times of each part that count: their median leaves seven disturbed ones aside, and has followed a
machine that became slower or quicker for good after eight."""

Part = Literal["preparation", "evaluation", "decoding"]


@dataclass(frozen=True)
class Shape:
    """What the time of a part depends on: the pictures' size, the prompts' length, how many."""

    size: PictureSize
    text_tokens: int
    batch: int = 1

    @classmethod
    def of(cls, ticket: Ticket, text_tokens: int, batch: int = 1) -> Shape:
        """The shape of a batch of which a ticket is one."""
        return cls(ticket.group.resolution.size, text_tokens, batch)

    @property
    def pixels(self) -> int:
        """Of all frames of all pictures."""
        return self.batch * self.size.height * self.size.width * (self.size.frames or 1)


@dataclass(frozen=True)
class Times:
    """What a batch takes, in ms.

    `preparation` is noise, conditioning, and what the first evaluation takes longer than others;
    `loop` is B evaluations.
    """

    preparation: float
    loop: float
    decoding: float

    @property
    def total(self) -> float:
        return self.preparation + self.loop + self.decoding


class Forecast:
    """The last times of each part at each shape; thread-safe. Nothing measured predicts 0.

    A shape that was never measured is predicted from the nearest one that was, in proportion to
    the pixels, until a first batch of it has run.
    """

    def __init__(self) -> None:
        self._parts: dict[Part, dict[Shape, _Recent]] = {
            "preparation": {},
            "evaluation": {},
            "decoding": {},
        }
        self._encoding = {0: _Recent()}  # by texts; of none it is next to nothing
        self._lock = threading.Lock()

    def note_encoding(self, texts: int, ms: float) -> None:
        """Encoding a job took `ms`, of whose texts so many were in no cache."""
        with self._lock:
            self._encoding.setdefault(texts, _Recent()).note(ms)

    def note_loop(self, shape: Shape, evaluation_ms: float, preparation_ms: float) -> None:
        """An evaluation took `evaluation_ms`, and all else until the latent `preparation_ms`."""
        self._note("evaluation", shape, evaluation_ms)
        self._note("preparation", shape, preparation_ms)

    def note_decoding(self, shape: Shape, ms: float) -> None:
        """Decoding a batch took `ms`, whatever its prompts' length."""
        self._note("decoding", replace(shape, text_tokens=0), ms)

    def encoding_ms(self, texts: int) -> float:
        """What encoding a job takes of whose texts so many are in no cache."""
        with self._lock:
            nearest = min(self._encoding, key=lambda known: abs(known - texts))
            return self._encoding[nearest].median

    def times(self, shape: Shape, budget: int, *, is_quickest: bool = False) -> Times:
        """What a batch takes after encoding; or took at the quickest that is remembered."""
        with self._lock:
            return Times(
                self._typical("preparation", shape, is_quickest),
                budget * self._typical("evaluation", shape, is_quickest),
                self._typical("decoding", replace(shape, text_tokens=0), is_quickest),
            )

    def _note(self, part: Part, shape: Shape, ms: float) -> None:
        with self._lock:
            self._parts[part].setdefault(shape, _Recent()).note(ms)

    def _typical(self, part: Part, shape: Shape, is_quickest: bool) -> float:
        known = self._parts[part]
        if not known:
            return 0.0
        nearest = shape if shape in known else min(known, key=lambda other: _away(other, shape))
        recent = known[nearest]
        ms = recent.quickest if is_quickest else recent.median
        return ms * shape.pixels / nearest.pixels


def _away(known: Shape, wanted: Shape) -> tuple[float, int]:
    ratio = math.log(known.pixels / wanted.pixels)
    return abs(ratio), abs(known.text_tokens - wanted.text_tokens)


class _Recent:
    """The last times of one kind."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=REMEMBERED)
        self.median = self.quickest = 0.0

    def note(self, ms: float) -> None:
        self._times.append(ms)
        self.median, self.quickest = statistics.median(self._times), min(self._times)
