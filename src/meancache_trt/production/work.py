"""What the stages do with a batch: encode its prompts, denoise, decode.

    tickets ──encode──▶ Encoded ──denoise──▶ Latents ──decode──▶ Pictures

Each class belongs to one thread at a time. A batch that fails is tried again picture by picture,
so that one does not take the others with it; what fails alone goes on as a `Failure`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from meancache_trt.conditioning import joined
from meancache_trt.decoder import PictureDecoder
from meancache_trt.encoding import BundleEncoder
from meancache_trt.errors import MeanCacheError
from meancache_trt.graphs import Graphs
from meancache_trt.meancache.loop import OnEvaluation, check_finite
from meancache_trt.meancache.noise import draw_noise
from meancache_trt.production.tickets import Settings, Ticket
from meancache_trt.rendering import Rendering
from meancache_trt.session import Session
from meancache_trt.text_length import Tensors, cut_to_bucket

KEPT = 8
"""Sessions, or decoders, that a thread keeps: the longest unused goes first, with its memory."""

T = TypeVar("T")


class Cancelled(Exception):  # noqa: N818  nothing went wrong
    """Raised in `on_evaluation` to end a batch; its pictures are not tried again."""


@dataclass(frozen=True)
class Encoded:
    """A batch that the network can be fed: tickets of one group, prompts of one text length.

    `conditionings` has each ticket's tensors at that length. `on_evaluation` is called after each
    evaluation, where it is set; `Cancelled` raised in it ends the batch.
    """

    tickets: tuple[Ticket, ...]
    text_tokens: int
    conditionings: tuple[Tensors, ...]
    on_evaluation: OnEvaluation | None = None

    def single(self, index: int) -> Encoded:
        """One of its pictures, as a batch of one."""
        here = slice(index, index + 1)
        return replace(self, tickets=self.tickets[here], conditionings=self.conditionings[here])


@dataclass(frozen=True)
class Latents:
    """A batch after the loop: finite latents (batch, *latent_shape) float32, and the loop's time.

    `batch` is how many pictures the loop had.
    """

    tickets: tuple[Ticket, ...]
    latents: NDArray[np.float32]
    loop_ms: float
    batch: int

    def single(self, index: int) -> Latents:
        """One of its pictures, as a batch of one."""
        here = slice(index, index + 1)
        return replace(self, tickets=self.tickets[here], latents=self.latents[here])


@dataclass(frozen=True)
class Pictures:
    """A rendered batch: what `Rendering` holds, ticket by ticket."""

    tickets: tuple[Ticket, ...]
    renderings: tuple[Rendering, ...]
    batch: int


@dataclass(frozen=True)
class Failure:
    """A job without a picture, and why."""

    ticket: Ticket
    error: Exception


class Encode:
    """Tickets of one group to batches of one text length, at most `batch` pictures each, in order.

    Batches depend on these tickets alone.
    """

    def __init__(self, graphs: Graphs, encoder: BundleEncoder) -> None:
        self._export, self._encoder = graphs.bundle.export, encoder

    def __call__(self, tickets: Sequence[Ticket], batch: int) -> list[Encoded | Failure]:
        """Encode each distinct prompt once."""
        made: list[Encoded | Failure] = []
        by_length: dict[int, list[tuple[Ticket, Tensors]]] = {}
        for ticket, found in zip(tickets, self._encoded(tickets), strict=True):
            if isinstance(found, Failure):
                made.append(found)
            else:
                by_length.setdefault(found[0], []).append((ticket, found[1]))
        for length, members in by_length.items():
            for start in range(0, len(members), batch):
                some, tensors = zip(*members[start : start + batch], strict=True)
                made.append(Encoded(some, length, tensors))
        return made

    def _encoded(self, tickets: Sequence[Ticket]) -> list[tuple[int, Tensors] | Failure]:
        try:
            return self._lengths(tickets)
        except Exception as error:
            if len(tickets) == 1:
                return [Failure(tickets[0], error)]
            return [found for ticket in tickets for found in self._encoded([ticket])]

    def _lengths(self, tickets: Sequence[Ticket]) -> list[tuple[int, Tensors] | Failure]:
        is_guided = self._export.guidance.is_classifier_free
        negatives = [ticket.negative_prompt for ticket in tickets] if is_guided else ""
        prompts = [ticket.job.prompt for ticket in tickets]
        found = self._encoder.for_pictures(prompts, negatives)
        return [cut_to_bucket(self._export, conditioning) for conditioning in found]


class Denoise:
    """Batches to latents, in sessions that are made once for each schedule, size and batch."""

    def __init__(self, graphs: Graphs, settings: Settings) -> None:
        self._graphs, self._settings = graphs, settings
        self._sessions: OrderedDict[Hashable, Session] = OrderedDict()

    def __call__(self, encoded: Encoded | Failure) -> list[Latents | Failure]:
        """Run the loop; pictures whose latent is not finite are failures."""
        if isinstance(encoded, Failure):
            return [encoded]
        return tried_apart(self._run, encoded)

    def _run(self, encoded: Encoded) -> list[Latents | Failure]:
        tickets, group = encoded.tickets, encoded.tickets[0].group
        shape = group.resolution.noise_shape
        noise = [draw_noise(self._settings.noise, ticket.seed, shape) for ticket in tickets]
        denoised = self.session(encoded).denoise(
            np.stack(noise),
            joined(encoded.conditionings),
            _scales(tickets),
            encoded.on_evaluation,
        )
        failures = dict(_not_finite(denoised.latents))
        whole = Latents(tickets, denoised.latents, denoised.loop_ms, len(tickets))
        if not failures:
            return [whole]
        return [
            Failure(tickets[index], failures[index]) if index in failures else whole.single(index)
            for index in range(len(tickets))
        ]

    def session(self, encoded: Encoded) -> Session:
        """The session of a batch; made once, then kept for a while."""
        ticket = encoded.tickets[0]
        resolution = ticket.group.resolution.with_text(encoded.text_tokens)
        batch = len(encoded.tickets)
        key = (ticket.schedule_digest, resolution.size, encoded.text_tokens, batch)

        def make() -> Session:
            with self._graphs.runtime.turn():
                return Session(self._graphs, ticket.group.schedule, resolution, batch=batch)

        return _kept(self._sessions, key, make)


class Decode:
    """Latents to pictures. Without `needs_pixels` nothing is decoded, and `pixels` are empty."""

    def __init__(self, graphs: Graphs, settings: Settings, *, needs_pixels: bool = True) -> None:
        self._graphs, self._settings, self._needs_pixels = graphs, settings, needs_pixels
        self._decoders: OrderedDict[Hashable, PictureDecoder] = OrderedDict()

    def __call__(self, found: Latents | Failure) -> list[Pictures | Failure]:
        """Decode a batch."""
        if isinstance(found, Failure):
            return [found]
        return tried_apart(self._run, found)

    def _run(self, found: Latents) -> list[Pictures | Failure]:
        pixels = self._pixels(found) if self._needs_pixels else [_NO_PIXELS] * len(found.tickets)
        renderings = [
            self._rendering(found, index, pixels[index]) for index in range(len(found.tickets))
        ]
        return [Pictures(found.tickets, tuple(renderings), found.batch)]

    def _pixels(self, found: Latents) -> NDArray[np.float32]:
        resolution, batch = found.tickets[0].group.resolution, len(found.tickets)

        def make() -> PictureDecoder:
            with self._graphs.runtime.turn():
                return PictureDecoder(self._graphs, resolution, batch)

        decoder = _kept(self._decoders, (resolution.size, batch), make)
        return decoder.run(found.latents, vae_tiling=self._settings.vae_tiling)

    def _rendering(self, found: Latents, index: int, pixels: NDArray[np.float32]) -> Rendering:
        ticket, bundle = found.tickets[index], self._graphs.bundle
        is_guided = bundle.export.guidance.is_classifier_free
        return Rendering(
            prompt=ticket.job.prompt,
            seed=ticket.seed,
            noise=self._settings.noise,
            schedule=ticket.group.schedule.name,
            schedule_digest=ticket.schedule_digest,
            guidance_scale=ticket.guidance_scale,
            bundle_id=bundle.manifest.bundle_id,
            latent=found.latents[index],
            pixels=pixels,
            loop_ms=found.loop_ms,
            frames_per_second=bundle.export.frames_per_second,
            negative_prompt=ticket.negative_prompt if is_guided else None,
            vae_tiling=self._settings.vae_tiling,
        )


_NO_PIXELS = np.zeros((0, 0, 3), np.float32)


def tried_apart(run: Callable[[Any], list[Any]], batch: Any) -> list[Any]:
    """`run(batch)`, or where that raises each of its pictures alone, and failures of the rest."""
    try:
        return run(batch)
    except Cancelled as error:
        return [Failure(ticket, error) for ticket in batch.tickets]
    except Exception as error:
        if len(batch.tickets) == 1:
            return [Failure(batch.tickets[0], error)]
        singles = (batch.single(index) for index in range(len(batch.tickets)))
        return [made for single in singles for made in tried_apart(run, single)]


def reason(error: BaseException) -> str:
    """An error for a log: the message of ours, the type too of others'."""
    is_ours = isinstance(error, (MeanCacheError, Cancelled))
    return str(error) if is_ours else f"{type(error).__name__}: {error}"


def _scales(tickets: Sequence[Ticket]) -> NDArray[np.float32] | None:
    scales = [ticket.guidance_scale for ticket in tickets]
    return None if None in scales else np.array(scales, np.float32)


def _not_finite(latents: NDArray[np.float32]) -> Iterable[tuple[int, Exception]]:
    for index, latent in enumerate(latents):
        try:
            check_finite(latent)
        except MeanCacheError as error:
            yield index, error


def _kept(made: OrderedDict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """What `make` made for a key, kept while it is among the last used ones."""
    if key in made:
        made.move_to_end(key)
    else:
        while len(made) >= KEPT:
            made.popitem(last=False)
        made[key] = make()
    return made[key]
