"""Requests to an ASGI app as a server would hand them on, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What came back, and how many bytes of the body had been asked for by then.

    `status` is None where nothing came.
    """

    status: int | None
    headers: Mapping[str, str]
    body: bytes
    read_bytes: int


async def ask(
    app: Any,
    method: str,
    path: str,
    headers: Sequence[tuple[str, str]] = (),
    pieces: AsyncIterator[bytes] | None = None,
) -> Answer:
    """One request. The client goes away where `pieces` raise `ConnectionError`."""
    sent: list[dict[str, Any]] = []
    left = _none() if pieces is None else pieces
    read_bytes = 0
    is_over = False

    async def receive() -> dict[str, Any]:
        nonlocal read_bytes, is_over
        if is_over:
            await asyncio.Event().wait()  # the client listens and says no more
        try:
            piece = await anext(left)
        except StopAsyncIteration:
            is_over = True
            return {"type": "http.request", "body": b"", "more_body": False}
        except ConnectionError:
            return {"type": "http.disconnect"}
        read_bytes += len(piece)
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(_scope(method, path, headers), receive, send)
    starts = [message for message in sent if message["type"] == "http.response.start"]
    return Answer(
        status=starts[0]["status"] if starts else None,
        headers={
            name.decode("latin-1"): value.decode("latin-1")
            for start in starts
            for name, value in start["headers"]
        },
        body=b"".join(message.get("body", b"") for message in sent),
        read_bytes=read_bytes,
    )


async def _none() -> AsyncIterator[bytes]:
    for piece in ():
        yield piece


def _scope(method: str, path: str, headers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
