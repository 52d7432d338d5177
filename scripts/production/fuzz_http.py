"""The service under hostile hands: requests made from its OpenAPI by schemathesis, and by hand.

python -m scripts.production.fuzz_http BUNDLE [--requests 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, strategies
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode
from scripts.production.asgi import Answer, ask

from meancache_trt.bundle import Bundle
from meancache_trt.meancache.schedule import bake
from meancache_trt.production.hosting import Hosting, opened_app
from meancache_trt.production.jobs import Limits
from meancache_trt.production.service import GENERATIONS
from meancache_trt.production.service_wire import ServiceLimits
from meancache_trt.production.tickets import Defaults
from meancache_trt.render import load

TOKEN = "a-token-of-the-fuzz"
LIMITS = ServiceLimits(
    job=Limits(prompt_characters=200), body_bytes=4096, images=2, body_s=1.0, request_s=60.0
)
"""Low, so that what is beyond them is common and cheap."""

_AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
_JSON = {"Content-Type": "application/json"}
_DOCUMENTED = frozenset({503, 504})
"""Of server errors these are answers; any other is a fault."""

_NOT_PROMISED = ("positive_data_acceptance", "not_a_server_error")
"""Checks of schemathesis that are left out: a schema cannot say which schedule goes with which
size, guidance or target; and `_DOCUMENTED` is what server errors are held against."""

_HUGE = 100 << 20
_TRAVERSALS = (
    *("../../etc/passwd", "/etc/passwd", "..\\..\\windows\\win.ini", "file:///etc/passwd"),
    *("%2e%2e%2fetc%2fpasswd", "b1.json", "./b1", "~/b1", "$(touch x)", "`id`", "b1\0", "\ud800"),
)
_TOO_LARGE = 413
_NAMES = ("model", "size", "schedule", "output_format", "response_format", "negative_prompt")
_MALFORMED: tuple[bytes, ...] = (
    *(b"", b" ", b"null", b"[]", b"1", b'"a"', b"{", b"}", b'{"prompt"}', b"{'prompt': 'a'}"),
    *(b'{"prompt": "a"} x', b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "n": NaN}'),
    *(b'{"prompt": "a", "guidance_scale": Infinity}', b'{"prompt": "a", "seed": 1e999}'),
    *(b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"prompt": "\xff"}', b"\xef\xbb\xbf{}"),
    *(b"\x00" * 100, b"[" * 4000, b'{"a":' * 800, b'{"prompt": "a", "n": ' + b"9" * 4000 + b"}"),
    *(b'{"prompt": "a", "seed": -1}', b'{"prompt": "a", "seed": 18446744073709551616}'),
    *(b'{"prompt": "a", "n": true}', b'{"prompt": "a", "n": 1.5}', b'{"prompt": ["a"]}'),
    *(b'{"prompt": "a", "stream": true}', b'{"prompt": "a", "response_format": "url"}'),
    *(b'{"prompt": ""}', b'{"prompt": " "}', b'{"prompt": "\\u0000"}', b'{"n": 1}'),
)


@dataclass
class Outcome:
    """Requests by the status of their answers, and every file that was opened to be written."""

    statuses: Counter[int] = field(default_factory=Counter)
    written: list[str] = field(default_factory=list)


def quick_bundle(path: Path) -> None:
    """Add a schedule of one evaluation, b1, so that pictures take milliseconds."""
    with load(path, embedding_cache="off") as pipeline:
        schedule = bake("euler", pipeline.grid(1), [0], name="b1")
    Bundle.open(path).add_schedule(schedule)


def run(bundle: Path, requests: int, seed: int) -> Outcome:
    """So many fuzzed requests to a bundle that has b1, and those by hand.

    Raises `AssertionError` for an answer that the OpenAPI does not have, or a fault.
    """
    hosting = Hosting(
        bundle=bundle,
        threads=1,
        embedding_cache="off",
        defaults=Defaults(schedule="b1"),
        limits=LIMITS,
        token=TOKEN,
    )
    outcome = Outcome()
    with opened_app(hosting) as app, noting_writes(outcome.written):
        outcome.statuses += fuzz(app, requests, seed)
        outcome.statuses += asyncio.run(by_hand(app))
    return outcome


def fuzz(app: FastAPI, requests: int, seed: int) -> Counter[int]:
    """Requests made from the OpenAPI, half of them against it; their answers are held to it."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=_AUTHORIZED)
    operation = schema[GENERATIONS]["POST"]
    load_all_checks()
    left_out = [CHECKS.get_one(name) for name in _NOT_PROMISED]
    # A body that is too large is refused unread, which this check does not count as a refusal.
    unread = [*left_out, CHECKS.get_one("negative_data_rejection")]
    statuses: Counter[int] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=requests,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(
        strategies.one_of(
            operation.as_strategy(GenerationMode.POSITIVE),
            operation.as_strategy(GenerationMode.NEGATIVE),
        )
    )
    def send(case: schemathesis.Case) -> None:
        response = case.call(headers=_AUTHORIZED)
        statuses[response.status_code] += 1
        assert response.status_code < 500 or response.status_code in _DOCUMENTED, response.text
        excluded = unread if response.status_code == _TOO_LARGE else left_out
        case.validate_response(response, headers=_AUTHORIZED, excluded_checks=excluded)

    send()
    return statuses


async def by_hand(app: FastAPI) -> Counter[int]:
    """What no schema thinks of, each with the status that it has to get."""
    statuses: Counter[int] = Counter()

    async def expect(status: int | None, *arguments: Any) -> Answer:
        answer = await ask(app, *arguments)
        assert answer.status == status, (arguments, answer)
        statuses[status or 0] += 1
        if status not in (None, 200, 499):
            assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}
        return answer

    for body in _MALFORMED:
        await expect(400, "POST", GENERATIONS, _headers(), _pieces(body))
    await _expect_names(expect)
    await _expect_bodies(expect)
    await _expect_paths(expect)
    return statuses


async def _expect_names(expect: Any) -> None:
    """Paths in place of names are refused; a prompt is text, whatever it says."""
    for text in _TRAVERSALS:
        for name in _NAMES:
            body = json.dumps({"prompt": "a", name: text}).encode()
            answer = await expect(400, "POST", GENERATIONS, _headers(), _pieces(body))
            assert b"root:" not in answer.body
        body = json.dumps({"prompt": text}).encode()
        is_text = "\0" not in text and "\ud800" not in text
        await expect(200 if is_text else 400, "POST", GENERATIONS, _headers(), _pieces(body))


async def _expect_bodies(expect: Any) -> None:
    """Bodies that are too large, too slow, of no type, or whose sender goes away."""
    most = LIMITS.body_bytes + (64 << 10)
    chunked = await expect(413, "POST", GENERATIONS, _headers(), _zeros(_HUGE))
    assert chunked.read_bytes <= most, chunked.read_bytes
    for length in (str(_HUGE), "9" * 5000):
        said = [*_headers(), ("Content-Length", length)]
        answer = await expect(413, "POST", GENERATIONS, said, _zeros(_HUGE))
        assert answer.read_bytes == 0
    await expect(408, "POST", GENERATIONS, _headers(), _slow())
    await expect(499, "POST", GENERATIONS, _headers(), _cut_off())
    for kind in ((), (("Content-Type", "text/plain"),), (("Content-Type", "é/" * 2000),)):
        await expect(415, "POST", GENERATIONS, [*_AUTHORIZED.items(), *kind], _pieces(b"{}"))


async def _expect_paths(expect: Any) -> None:
    """Paths, methods, tokens and headers."""
    for path in ("/../../etc/passwd", f"{GENERATIONS}/../../..", "//etc/passwd", "/\0", "/é" * 999):
        await expect(404, "GET", path, _headers())
    for method in ("PUT", "DELETE", "TRACE", "PATCH", "NONSENSE"):
        await expect(405, method, GENERATIONS, _headers())
    for token in ("", "x", TOKEN[:-1], TOKEN + "x", "é" * 9999):
        await expect(401, "GET", "/ready", [("Authorization", f"Bearer {token}")])
    flood = [(f"x-{number}", "y" * 100) for number in range(10_000)]
    await expect(200, "GET", "/ready", [*_headers(), *flood])


def _headers() -> Sequence[tuple[str, str]]:
    return [*_AUTHORIZED.items(), *_JSON.items()]


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 1000):
        yield body[start : start + 1000]


async def _zeros(count: int) -> AsyncIterator[bytes]:
    piece = bytes(64 << 10)
    for _ in range(0, count, len(piece)):
        yield piece


async def _slow() -> AsyncIterator[bytes]:
    while True:
        yield b" "
        await asyncio.sleep(LIMITS.body_s / 4)


async def _cut_off() -> AsyncIterator[bytes]:
    yield b'{"prompt": '
    raise ConnectionResetError


@contextlib.contextmanager
def noting_writes(written: list[str]) -> Iterator[None]:
    """Note every path that this process opens to write, makes, renames or removes.

    What the fuzzers keep of their own under `.hypothesis` does not count.
    """
    is_on = True

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if not is_on:
            return
        if event == "open" and isinstance(arguments[2], int) and not arguments[2] & _WRITING:
            return
        is_path = event in _CHANGES and not isinstance(arguments[0], int)
        if is_path and ".hypothesis" not in str(arguments[0]):
            written.append(f"{event} {arguments[0]}")

    sys.addaudithook(note)  # which cannot be taken off again
    try:
        yield
    finally:
        is_on = False


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink"})


def main() -> None:
    """Fuzz a copy of a bundle, and print what came of it; a wrong answer is a traceback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=2000, help="made from the OpenAPI")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bundle = Path(work) / "fuzzed.mcb"
        shutil.copytree(options.bundle, bundle)
        quick_bundle(bundle)
        outcome = run(bundle, options.requests, options.seed)
    found = {
        "requests": outcome.statuses.total(),
        "statuses": {str(status): count for status, count in sorted(outcome.statuses.items())},
        "faults": [f"the service wrote: {path}" for path in outcome.written],
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
