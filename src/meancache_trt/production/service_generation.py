"""A request for pictures, from its first byte to its answer."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import secrets
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from meancache_trt.errors import InputError, MeanCacheError, RefusedError, RenderError
from meancache_trt.media.formats import OutputFormat
from meancache_trt.production.jobs import Job, shown
from meancache_trt.production.renderer import Renderer
from meancache_trt.production.service_metrics import NOBODY_LISTENS
from meancache_trt.production.service_wire import (
    Facts,
    Image,
    ImagesRequest,
    ImagesResponse,
    Offer,
    Problem,
    ServiceLimits,
    parse_request,
)
from meancache_trt.production.work import reason
from meancache_trt.rendering import Rendering
from meancache_trt.shapes import PictureSize

_LOG = logging.getLogger(__name__)

_CLOSE = {"Connection": "close"}
"""Sent where a body was not read to its end, so that nobody goes on sending it."""

_RANDOM_BITS = 53
"""Of seeds that nobody chose: JavaScript reads larger whole numbers inexactly."""

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """The pictures of a request, and how long they were predicted to take alone."""

    renderings: Sequence[Rendering]
    predicted_ms: float


class Generation:
    """The endpoint. Each picture of a request is a job of its own."""

    def __init__(self, renderer: Renderer, offer: Offer, limits: ServiceLimits) -> None:
        self._renderer, self._offer, self._limits = renderer, offer, limits
        self._model = offer.request_model(limits)
        self._under_way = 0

    async def answer(self, request: Request) -> Response:
        """Pictures for a prompt."""
        if self._under_way >= self._limits.requests:
            message = f"{self._under_way} requests are under way, as many as there may be"
            raise Problem(429, "too_many_requests", message, headers=_CLOSE | {"Retry-After": "1"})
        self._under_way += 1
        try:
            return await self._answered(request)
        except ClientDisconnect:
            return Response(status_code=NOBODY_LISTENS)
        finally:
            self._under_way -= 1

    async def _answered(self, request: Request) -> Response:
        start = time.monotonic()
        asked = parse_request(await read_body(request, self._limits), self._model)
        size = self._offer.sizes[0] if asked.size in (None, "auto") else str(asked.size)
        form, jobs = _form(asked, size), _jobs(asked, size)
        seconds = self._limits.request_s if asked.deadline_ms is None else asked.deadline_ms / 1e3
        made = await self._made(request, jobs, start + seconds, asked.priority or 0)
        files = await run_in_threadpool(_files, made, form)
        answer = ImagesResponse(
            created=int(time.time()),
            data=files,
            output_format=asked.output_format or "png",
            size=size,
            meancache_trt=self._facts(made, start),
        )
        return Response(answer.model_dump_json(), media_type="application/json")

    def _facts(self, made: Made, start: float) -> Facts:
        first = made.renderings[0]
        return Facts(
            schedule=first.schedule,
            schedule_digest=first.schedule_digest,
            evaluations=self._offer.budgets.get(first.schedule),
            guidance_scale=first.guidance_scale,
            bundle_id=first.bundle_id,
            predicted_ms=made.predicted_ms,
            elapsed_ms=1e3 * (time.monotonic() - start),
        )

    async def _made(
        self, request: Request, jobs: Sequence[Job], deadline: float, priority: int
    ) -> Made:
        submission = Submission(self._renderer, jobs, deadline, priority)
        try:
            return await while_heard(request, submission.run(), deadline - time.monotonic())
        except ClientDisconnect:
            raise
        except Exception as error:
            is_expected = isinstance(error, (MeanCacheError, TimeoutError))
            if not is_expected and not submission.is_accepted:
                raise
            raise self._problem(error, is_accepted=submission.is_accepted) from error
        finally:
            submission.cancel()

    def _problem(self, error: Exception, *, is_accepted: bool) -> Problem:
        """What to answer where jobs were refused, or were accepted and failed."""
        message = self._offer.without_paths(reason(error))
        if isinstance(error, TimeoutError):
            return Problem(504, "deadline_exceeded", "the deadline passed; nothing was rendered")
        if isinstance(error, RefusedError) and error.retry_after_s is not None:
            after = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return Problem(429, "too_many_requests", message, headers=after)
        if isinstance(error, RefusedError) and self._renderer.status().closed is None:
            return Problem(504, "deadline_exceeded", message)
        is_invalid = isinstance(error, MeanCacheError) and not isinstance(error, RefusedError)
        if is_invalid and not is_accepted:
            return Problem(400, "invalid_value", message)
        _LOG.error("a picture could not be rendered", exc_info=error)
        return Problem(503, "render_failed", f"the picture could not be rendered: {message}")


class Submission:
    """Jobs of one request; a request that ends early takes all of them back."""

    def __init__(
        self, renderer: Renderer, jobs: Sequence[Job], deadline: float, priority: int
    ) -> None:
        self._renderer, self._jobs = renderer, jobs
        self._deadline, self._priority = deadline, priority
        self._futures: list[Future[Rendering]] = []
        self._cancelled = threading.Event()

    @property
    def is_accepted(self) -> bool:
        """Whether the renderer has taken on every job."""
        return len(self._futures) == len(self._jobs)

    async def run(self) -> Made:
        """Hand the jobs on and wait for their pictures; raises what the first to fail does."""
        predicted_ms = await run_in_threadpool(self._submit)
        return Made(await asyncio.gather(*map(asyncio.wrap_future, self._futures)), predicted_ms)

    def cancel(self) -> None:
        """Take back what is not done, also what a thread is only about to hand on."""
        self._cancelled.set()
        for future in self._futures:
            future.cancel()

    def _submit(self) -> float:
        """How long one of the jobs takes alone."""
        predicted_ms = self._renderer.predict_ms(self._jobs[0])
        for job in self._jobs:
            left_s = max(self._deadline - time.monotonic(), 1e-3)
            future = self._renderer.submit(job, deadline_s=left_s, priority=self._priority)
            self._futures.append(future)
            if self._cancelled.is_set():
                future.cancel()
        return predicted_ms


async def read_body(request: Request, limits: ServiceLimits) -> bytes:
    """The body of a request. Raises `Problem` for one that is too large, too slow or no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"expected a body of application/json, found {shown(kind) if kind else 'no type'}"
        raise Problem(415, "unsupported_media_type", message, headers=_CLOSE)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 15 or int(declared) > limits.body_bytes):
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:  # it came in chunks, or lied
                    raise _too_large(limits)
    except TimeoutError as error:
        message = f"the body did not arrive within {limits.body_s:g} s; send it again"
        raise Problem(408, "request_timeout", message, headers=_CLOSE) from error
    return bytes(body)


def _too_large(limits: ServiceLimits) -> Problem:
    message = f"expected a body of at most {limits.body_bytes:,} bytes, found more; shorten it"
    return Problem(413, "body_too_large", message, headers=_CLOSE)


async def while_heard(request: Request, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Do work for as long as somebody waits for it; else it is cancelled.

    Raises `ClientDisconnect` where the client goes away, `TimeoutError` after `seconds`.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        done, _ = await asyncio.wait(
            (working, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if working in done:
            if working.cancelled():
                raise RenderError("the service stops and renders no more")
            return working.result()
        raise ClientDisconnect if gone in done else TimeoutError
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _form(asked: ImagesRequest, size: str) -> OutputFormat:
    try:
        form = OutputFormat(asked.output_format or "png", asked.output_compression)
        form.check(PictureSize.parse(size))
    except InputError as error:
        raise Problem(400, "invalid_value", str(error), param="output_format") from error
    return form


def _jobs(asked: ImagesRequest, size: str) -> list[Job]:
    count = asked.n or 1
    seeds = [secrets.randbits(_RANDOM_BITS) for _ in range(count)]
    if asked.seed is not None:
        if asked.seed + count > 2**64:
            message = f"seeds count up from seed to at most {2**64 - 1}; found {asked.seed}"
            raise Problem(400, "invalid_value", f"{message} for {count} pictures", param="seed")
        seeds = list(range(asked.seed, asked.seed + count))
    return [
        Job(
            id=f"image-{place}",
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            seed=seed,
            resolution=size,
            guidance_scale=asked.guidance_scale,
            schedule=asked.schedule,
            target_psnr=asked.target_psnr,
            percentile=asked.percentile,
        )
        for place, seed in enumerate(seeds)
    ]


def _files(made: Made, form: OutputFormat) -> list[Image]:
    """Pictures as they leave. Raises `Problem` where a file has no room for the prompts."""
    try:
        return [
            Image(b64_json=base64.b64encode(rendering.encode(form)).decode(), seed=rendering.seed)
            for rendering in made.renderings
        ]
    except InputError as error:
        raise Problem(400, "invalid_value", str(error), param="output_format") from error
