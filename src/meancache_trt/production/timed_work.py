"""What becomes of a job, step by step, with the time of each step noted."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec

from meancache_trt.meancache.loop import OnEvaluation
from meancache_trt.production.batch_sizes import blank_conditioning
from meancache_trt.production.forecast import Forecast, Shape
from meancache_trt.production.tickets import Settings, Ticket
from meancache_trt.production.work import (
    Decode,
    Denoise,
    Encode,
    Encoded,
    Failure,
    Latents,
    Pictures,
)
from meancache_trt.render import Pipeline

T = TypeVar("T")

_WARM_ROUNDS = 3
"""Timed at the start, after one that allocates; on a GPU the second captures the loop's graph."""


class TimedWork:
    """Encode, denoise and decode; each of the three belongs to one thread at a time."""

    def __init__(self, pipeline: Pipeline, settings: Settings, forecast: Forecast) -> None:
        self._forecast, self._graphs = forecast, pipeline.graphs
        self._export = pipeline.bundle.export
        lane = pipeline.graphs.lane()
        self._encoder = pipeline.encoder_on(lane)
        self._encode = Encode(lane, self._encoder)
        self._denoise = Denoise(pipeline.graphs, settings)
        self._decode = Decode(pipeline.graphs.lane(), settings)

    def uncached_texts(self, ticket: Ticket) -> int:
        """How many of a job's texts have to be encoded; any thread may ask."""
        is_guided = self._export.guidance.is_classifier_free
        negative = [ticket.negative_prompt] if is_guided else []
        return self._encoder.missing([ticket.job.prompt, *negative])

    def encode(self, ticket: Ticket) -> Encoded | Failure:
        """A job as a batch of one."""
        texts = self.uncached_texts(ticket)
        start = time.perf_counter()
        (made,) = self._encode([ticket], 1)
        if isinstance(made, Encoded):
            self._forecast.note_encoding(texts, _ms_since(start))
        return made

    def denoise(self, encoded: Encoded) -> list[Latents | Failure]:
        """The loop of a batch; only one that ran whole and at once is noted."""
        watch = _Watch(encoded.on_evaluation)
        start = time.perf_counter()
        made = self._denoise(watch.set_on(encoded))
        match made:
            case [Latents() as found] if found.batch == len(encoded.tickets):
                whole_ms, ticket = _ms_since(start), encoded.tickets[0]
                budget = ticket.group.schedule.budget
                evaluation_ms = watch.evaluation_ms() or found.loop_ms / budget
                self._forecast.note_loop(
                    Shape.of(ticket, encoded.text_tokens, found.batch),
                    evaluation_ms,
                    whole_ms - budget * evaluation_ms,
                )
        return made

    def decode(self, found: Latents) -> list[Pictures | Failure]:
        """The pictures of a batch."""
        start = time.perf_counter()
        made = self._decode(found)
        match made:
            case [Pictures(tickets=tickets)] if tickets == found.tickets:
                shape = Shape.of(tickets[0], 0, len(tickets))
                self._forecast.note_decoding(shape, _ms_since(start))
        return made

    def warm_up(
        self, tickets: Sequence[Ticket], sizes: Sequence[int], on_evaluation: OnEvaluation | None
    ) -> None:
        """Make ready and measure what tickets need, at all text lengths and the batch sizes.

        Raises what a job of theirs would fail with.
        """
        for _ in range(2):  # the first loads what encodes
            _check(self.encode(_with_new_prompt(tickets[0])))
        for ticket in tickets:
            for length in self._export.text_lengths:
                resolution = ticket.group.resolution.with_text(length)
                tensors = blank_conditioning(self._graphs, resolution, 1)
                for size in sizes:
                    some, samples = (ticket,) * size, (tensors,) * size
                    self._warm(Encoded(some, length, samples, on_evaluation))

    def _warm(self, encoded: Encoded) -> None:
        for made in self._denoise(encoded):
            for item in self._decode(_check(made)):
                _check(item)
        for _ in range(_WARM_ROUNDS):
            for found in self.denoise(encoded):
                if isinstance(found, Latents):
                    self.decode(found)


class _Watch:
    """When evaluations end, where a loop says so. The first is slower: caches are cold."""

    def __init__(self, on_evaluation: OnEvaluation | None) -> None:
        self._on_evaluation = on_evaluation
        self._ends: list[float] = []

    def set_on(self, encoded: Encoded) -> Encoded:
        if self._on_evaluation is None:
            return encoded
        return replace(encoded, on_evaluation=self._watch)

    def evaluation_ms(self) -> float | None:
        """The mean of all but the first evaluation; None where that is not known."""
        if len(self._ends) < 2:
            return None
        return 1e3 * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def _watch(self, done: int, budget: int) -> None:
        assert self._on_evaluation is not None
        self._ends.append(time.perf_counter())
        self._on_evaluation(done, budget)


def _check(made: T | Failure) -> T:
    if isinstance(made, Failure):
        raise made.error
    return made


def _with_new_prompt(ticket: Ticket) -> Ticket:
    """A job whose prompt is in no cache."""
    return replace(ticket, job=msgspec.structs.replace(ticket.job, prompt=secrets.token_hex(8)))


def _ms_since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)
