"""A service over a real renderer, on a real server in a thread of this process."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from meancache_trt.production.hosting import listen
from meancache_trt.production.service import GENERATIONS


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@dataclass(frozen=True)
class Client:
    port: int
    token: str | None = None

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> Reply:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, self._authorized() | headers)
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.getheaders()), answer.read())

    def generate(self, **fields: object) -> Reply:
        content = json.dumps({"prompt": "large plain red circle", **fields}).encode()
        return self.ask("POST", GENERATIONS, content, {"Content-Type": "application/json"})

    def _authorized(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


@contextlib.contextmanager
def running(app: FastAPI, token: str | None = None) -> Iterator[Client]:
    """The app on a free port."""
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_config=None))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Client(listening.getsockname()[1], token)
        finally:
            server.should_exit = True
            thread.join()
