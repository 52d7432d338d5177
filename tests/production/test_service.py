from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from meancache_trt.bundle import Bundle
from meancache_trt.meancache.schedule import bake
from meancache_trt.media.formats import OutputFormat
from meancache_trt.production.renderer import Renderer, RendererOptions
from meancache_trt.production.service import GENERATIONS, make_app
from meancache_trt.production.service_wire import Offer, ServiceLimits
from meancache_trt.production.tickets import Defaults
from meancache_trt.render import Pipeline
from tests.production.serving import Client, running

PROMPT = "large plain red circle"
TOKEN = "a token may not have blanks".replace(" ", "-")
CAPACITY = 2
LIMITS = ServiceLimits(images=3, body_bytes=20_000, request_s=60)
NEXT_S = 60


@dataclass(frozen=True)
class Served:
    """A service, and what it is made of."""

    client: Client
    renderer: Renderer
    pipeline: Pipeline


@pytest.fixture(scope="module")
def offered(shared_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline(Bundle.open(shared_bundle), threads=1, embedding_cache="off") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def served(offered: Pipeline) -> Iterator[Served]:
    options = RendererOptions(capacity=CAPACITY)
    with Renderer(offered, defaults=Defaults(schedule="b6"), options=options) as renderer:
        app = make_app(renderer, Offer.of(offered.bundle), LIMITS, TOKEN)
        with running(app, TOKEN) as client:
            yield Served(client, renderer, offered)


def file_of(item: dict[str, str]) -> bytes:
    return base64.b64decode(item["b64_json"], validate=True)


def rendered(shared_bundle: Path, seed: int, schedule: str = "b6", form: str = "png") -> bytes:
    """What the pipeline itself makes; of its own, since a renderer's is used by nobody else."""
    with Pipeline(Bundle.open(shared_bundle), embedding_cache="off") as pipeline:
        (rendering,) = pipeline.render([PROMPT], seed=seed, schedule=schedule)
    return rendering.encode(OutputFormat.parse(form))


def test_pictures_are_those_of_the_pipeline_with_seeds_counting_up(served, shared_bundle):
    reply = served.client.generate(
        model="shared", n=2, size="64x64", response_format="b64_json", seed=7, user="somebody"
    )
    assert reply.status == 200, reply.body
    answer = reply.json
    assert [item["seed"] for item in answer["data"]] == [7, 8]
    assert [file_of(item) for item in answer["data"]] == [
        rendered(shared_bundle, seed) for seed in (7, 8)
    ]
    facts = answer["meancache_trt"]
    assert (facts["schedule"], facts["evaluations"]) == ("b6", 6)
    assert facts["bundle_id"] == served.pipeline.bundle.manifest.bundle_id
    assert facts["predicted_ms"] > 0
    assert abs(answer["created"] - time.time()) < NEXT_S


def test_a_seed_that_nobody_chose_is_told_and_makes_the_picture_again(served):
    first = served.client.generate().json["data"][0]
    again = served.client.generate(seed=first["seed"]).json["data"][0]
    other = served.client.generate().json["data"][0]
    assert first == again
    assert first["seed"] != other["seed"]


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("jpeg:40", {"output_format": "jpeg", "output_compression": 40}),
        ("webp:100", {"output_format": "webp", "output_compression": 100}),
    ],
)
def test_pictures_come_in_the_format_asked_for(served, shared_bundle, form, fields):
    answer = served.client.generate(seed=1, schedule=10, **fields).json
    content = file_of(answer["data"][0])
    assert content == rendered(shared_bundle, 1, "b10", form)
    assert answer["output_format"] == fields["output_format"]
    assert Image.open(io.BytesIO(content)).size == (64, 64)


NEUTRAL = {
    "quality": "auto",
    "background": "opaque",
    "moderation": "low",
    "stream": False,
    "style": None,
    "partial_images": None,
    "size": "auto",
    "n": None,
    "seed": None,
}


def test_fields_that_choose_nothing_are_taken_at_their_neutral_values(served):
    assert served.client.generate(**NEUTRAL).status == 200


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": "a" * 10_001}, "prompt", "at most 10000 characters"),
        ({"promt": "a"}, "promt", "unknown field 'promt'; did you mean prompt?"),
        ({"response_format": "url"}, "response_format", "'b64_json', found 'url'"),
        ({"model": "dall-e-3"}, "model", "'shared', found 'dall-e-3'"),
        ({"size": "1024x1024"}, "size", "'auto' or '64x64', found '1024x1024'"),
        ({"schedule": "../b6.json"}, "schedule", "'full', 'b10', 'b6', 6, 10 or 50"),
        ({"n": 4}, "n", "less than or equal to 3"),
        ({"n": True}, "n", "valid integer, found true"),
        ({"seed": 2**64}, "seed", "less than 18446744073709551616"),
        ({"seed": 2**64 - 1, "n": 2}, "seed", "count up"),
        ({"stream": True}, "stream", "found true"),
        ({"style": "vivid"}, "style", "None, found 'vivid'"),
        ({"quality": "hd"}, "quality", "found 'hd'"),
        ({"background": "transparent"}, "background", "found 'transparent'"),
        ({"output_compression": 50}, "output_format", "png loses nothing"),
        ({"negative_prompt": "blue"}, None, "no classifier-free guidance"),
        ({"target_psnr": 40}, None, "no schedule of the bundle is known to keep 40 dB"),
        ({"deadline_ms": 60_001}, "deadline_ms", "less than or equal to 60000"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(served, fields, param, message):
    reply = served.client.generate(**fields)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error"
    assert message in reply.error["message"]


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({}, "found none"),
        ({"Authorization": f"Bearer {TOKEN}x"}, "found another"),
        ({"Authorization": f"Bearer {TOKEN[:-1]}"}, "found another"),
        ({"Authorization": f"Basic {TOKEN}"}, "found none"),
        ({"Authorization": TOKEN}, "found none"),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", GENERATIONS),
        *(("GET", path) for path in ("/v1/models", "/ready", "/metrics", "/openapi.json")),
    ],
)
def test_all_but_health_asks_for_the_token(served, method, path, headers, found):
    stranger = replace(served.client, token=None)
    reply = stranger.ask(method, path, b"{}" if method == "POST" else None, headers)
    assert reply.status == 401
    assert found in reply.error["message"]
    assert reply.headers["www-authenticate"] == "Bearer"
    assert stranger.ask("GET", "/health").status == 200


def test_without_a_token_none_is_asked_for(served):
    app = make_app(served.renderer, Offer.of(served.pipeline.bundle), LIMITS, None)
    with running(app) as client:
        assert client.ask("GET", "/ready").status == 200
        assert "401" not in client.ask("GET", "/openapi.json").body.decode()


def test_models_are_the_bundle(served):
    (model,) = served.client.ask("GET", "/v1/models").json["data"]
    assert (model["id"], model["sizes"]) == ("shared", ["64x64"])
    assert model["schedules"] == {"full": 50, "b10": 10, "b6": 6}


def test_metrics_count_what_was_asked(served):
    def found(line: str) -> float:
        lines = served.client.ask("GET", "/metrics").body.decode().splitlines()
        return sum(float(text.split()[-1]) for text in lines if text.startswith(line))

    refused = f'meancache_requests_total{{path="{GENERATIONS}",status="400"}}'
    before = found(refused), found("meancache_request_seconds_count")
    served.client.generate(n=0)
    served.client.generate()
    for name in ("one", "two"):
        served.client.ask("GET", f"/{name}")
    assert found(refused) == before[0] + 1
    assert found("meancache_request_seconds_count") == before[1] + 1
    assert found('meancache_requests_total{path="other"') >= 2
    assert found('meancache_stage_busy_share{stage="denoise"}') > 0


def test_a_full_queue_is_429_says_when_to_come_again_and_keeps_nothing(served):
    before = served.renderer.status().outcomes.get("cancelled", 0)
    reply = served.client.generate(n=CAPACITY + 1, schedule="full")
    assert (reply.status, reply.error["code"]) == (429, "too_many_requests")
    assert int(reply.headers["retry-after"]) >= 1
    wait_until(lambda: served.renderer.status().outcomes.get("cancelled", 0) == before + CAPACITY)
    assert served.client.generate().status == 200


def test_more_requests_than_allowed_are_429_before_they_are_read(served):
    limits = replace(LIMITS, requests=0)
    app = make_app(served.renderer, Offer.of(served.pipeline.bundle), limits, None)
    with running(app) as client:
        reply = client.generate()
        assert client.ask("GET", "/ready").status == 200
    assert (reply.status, reply.headers["retry-after"]) == (429, "1")


def test_a_deadline_that_cannot_be_met_is_504_at_once(served):
    reply = served.client.generate(schedule="full", deadline_ms=1)
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
    assert reply.error["type"] == "server_error"


def test_a_client_that_goes_away_cancels_its_jobs(served):
    cancelled = served.renderer.status().outcomes.get("cancelled", 0)
    connection = served.client.connect()
    content = json.dumps({"prompt": PROMPT, "n": 2, "schedule": "full"})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    connection.request("POST", GENERATIONS, content, headers)
    wait_until(lambda: served.renderer.status().rendering > 0)
    connection.close()
    wait_until(lambda: served.renderer.status().outcomes.get("cancelled", 0) == cancelled + 2)
    assert served.client.generate().status == 200


def wait_until(is_so) -> None:
    end = time.monotonic() + NEXT_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_picture_that_fails_is_503_with_the_reason(bundle):
    opened = Bundle.open(bundle)
    with Pipeline(opened, threads=1, embedding_cache="off") as pipeline:
        plain = bake("euler", pipeline.grid(1), [0], name="burst")
        burst = msgspec.structs.replace(plain, method="fitted", weights=((-3e38,),))
        opened.add_schedule(burst)
        with Renderer(pipeline, defaults=Defaults(schedule="b6")) as renderer:
            app = make_app(renderer, Offer.of(opened), LIMITS, None)
            with running(app) as client:
                reply = client.generate(schedule="burst")
                assert client.generate(schedule="b6").status == 200
    assert (reply.status, reply.error["code"]) == (503, "render_failed")
    assert "not finite" in reply.error["message"]


def test_a_renderer_that_was_closed_is_503(offered):
    with Renderer(offered, defaults=Defaults(schedule="b6")) as renderer:
        app = make_app(renderer, Offer.of(offered.bundle), LIMITS, None)
    with running(app) as client:
        ready, reply = client.ask("GET", "/ready"), client.generate()
        assert client.ask("GET", "/health").status == 200
    assert (ready.status, ready.error["code"]) == (503, "stopped")
    assert reply.status == 503
    assert "closed" in reply.error["message"]


def test_a_fault_of_ours_tells_nothing_of_itself(served, monkeypatch, caplog):
    def fault():
        raise RuntimeError("of which nobody hears")

    monkeypatch.setattr(served.renderer, "status", fault)
    reply = served.client.ask("GET", "/ready")
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert b"nobody" not in reply.body
    wait_until(lambda: "of which nobody hears" in caplog.text)


def test_an_endless_body_is_hung_up_on(served):
    most, chunk = 100 << 20, b"%x\r\n%b\r\n" % (1 << 16, bytes(1 << 16))
    sent = 0
    with (
        opened(served.client, "Transfer-Encoding: chunked") as connection,
        contextlib.suppress(ConnectionError),
    ):
        while sent < most:
            connection.sendall(chunk)
            sent += len(chunk)
    assert sent < most


def test_a_body_that_stops_coming_is_408(served):
    limits = replace(LIMITS, body_s=0.2)
    app = make_app(served.renderer, Offer.of(served.pipeline.bundle), limits, None)
    with running(app) as client, opened(client, "Content-Length: 100") as connection:
        connection.sendall(b'{"prompt": ')
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()


def opened(client: Client, header: str) -> socket.socket:
    """A connection on which a request for pictures has begun."""
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=NEXT_S)
    lines = (
        *(f"POST {GENERATIONS} HTTP/1.1", "Host: here", "Content-Type: application/json"),
        *(f"Authorization: Bearer {TOKEN}", header, "", ""),
    )
    connection.sendall("\r\n".join(lines).encode())
    return connection


def test_answers_name_no_path_of_this_machine(served):
    """The library's messages say where a bundle lies; strangers need not know."""
    offer = Offer.of(served.pipeline.bundle)
    where = str(served.pipeline.bundle.directory)
    assert offer.without_paths(f"this bundle, -o {where} --resolution") == (
        "this bundle, -o BUNDLE --resolution"
    )
