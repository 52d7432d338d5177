"""The service: OpenAI's images endpoint over a `Renderer`, as an ASGI app.

    POST /v1/images/generations   pictures for a prompt
    GET  /v1/models               the bundle
    GET  /health                  whether the process lives; asks for no token
    GET  /ready                   whether it takes requests
    GET  /metrics                 for Prometheus
    GET  /openapi.json            all of this, with every answer there can be

Nothing is written, and nothing that a request names is opened: sizes and schedules are looked up
among those of the bundle. Pictures leave in the answer.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Collection
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Lifespan

from meancache_trt import __version__
from meancache_trt.production.renderer import Renderer
from meancache_trt.production.service_generation import Generation
from meancache_trt.production.service_metrics import TEXT_FORMAT, Counted, Metrics
from meancache_trt.production.service_wire import (
    ErrorBody,
    ImagesResponse,
    ModelList,
    Offer,
    Problem,
    ServedModel,
    ServiceLimits,
    State,
)

GENERATIONS = "/v1/images/generations"
_PATHS = (GENERATIONS, "/v1/models", "/health", "/ready", "/metrics", "/openapi.json")

_MEANINGS = {
    400: "What is asked for is malformed, unknown or not to be had; `param` is the field.",
    401: "The token is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too much waits; Retry-After says when there may be room.",
    503: "A picture could not be rendered, or the service stops.",
    504: "The deadline cannot be met, or has passed.",
}
_RETRY_AFTER = {
    "Retry-After": {"required": True, "description": "Seconds.", "schema": {"type": "integer"}}
}
_BEARER = HTTPBearer(auto_error=False, scheme_name="token")


def make_app(
    renderer: Renderer,
    offer: Offer,
    limits: ServiceLimits,
    token: str | None,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """The service of a renderer, which outlives it.

    `offer` is of the renderer's bundle, and `limits.job` are the renderer's limits. `token` is what
    everything but /health asks for as `Authorization: Bearer`; None asks for nothing.
    """
    app = FastAPI(
        title="meancache-trt",
        version=__version__,
        summary="Pictures from a bundle, after OpenAI's images API.",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # served by a route of ours, which asks for the token
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers={
            Problem: _answer_problem,
            HTTPException: _answer_http_error,
            Exception: _answer_fault,
        },
    )
    metrics = Metrics(_PATHS, renderer.status)
    app.add_middleware(Counted, metrics=metrics, rendering_path=GENERATIONS)
    app.add_api_route("/health", health, response_model=State)
    guarded = APIRouter(
        dependencies=[] if token is None else [Security(_guard(token))],
        responses={} if token is None else _errors([401]),
    )
    guarded.add_api_route(
        GENERATIONS,
        Generation(renderer, offer, limits).answer,
        methods=["POST"],
        summary="Pictures for a prompt",
        response_model=ImagesResponse,
        responses=_errors(set(_MEANINGS) - {401}),
        openapi_extra=_body_of(offer, limits),
    )
    _add_facts(guarded, app, renderer, offer, metrics)
    app.include_router(guarded)
    return app


def _add_facts(
    router: APIRouter, app: FastAPI, renderer: Renderer, offer: Offer, metrics: Metrics
) -> None:
    """The routes that render nothing."""
    served = ServedModel(
        id=offer.model,
        created=0,
        owned_by=offer.bundle.export.model.name,
        bundle_id=offer.bundle.manifest.bundle_id,
        sizes=list(offer.sizes),
        schedules=dict(offer.budgets),
    )

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """The bundle."""
        return ModelList(data=[served])

    @router.get("/ready", response_model=State, responses=_errors([503]))
    async def ready() -> State:
        """Whether requests are taken."""
        closed = renderer.status().closed
        if closed is not None:
            raise Problem(503, "stopped", f"the renderer {closed}; start the service again")
        return State()

    @router.get("/metrics", response_class=PlainText)
    async def numbers() -> Response:
        """Prometheus' numbers."""
        return PlainText(metrics.encode())

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        """This description."""
        return app.openapi()


async def health() -> State:
    """Whether the process lives."""
    return State()


class PlainText(Response):
    """Prometheus' text format."""

    media_type = TEXT_FORMAT


def _guard(token: str) -> Callable[..., Awaitable[None]]:
    expected = token.encode()

    async def check(
        found: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
    ) -> None:
        given = b"" if found is None else found.credentials.encode()
        if not hmac.compare_digest(given, expected):
            message = "expected the service's token as `Authorization: Bearer TOKEN`, found " + (
                "none" if found is None else "another"
            )
            raise Problem(401, "invalid_token", message, headers={"WWW-Authenticate": "Bearer"})

    return check


def _errors(statuses: Collection[int]) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI says of answers that are errors."""
    return {
        status: {
            "model": ErrorBody,
            "description": _MEANINGS[status],
            **({"headers": _RETRY_AFTER} if status == 429 else {}),
        }
        for status in sorted(statuses)
    }


def _body_of(offer: Offer, limits: ServiceLimits) -> dict[str, Any]:
    """What the OpenAPI says of a request's body, which is parsed by us, more strictly."""
    schema = offer.request_model(limits).model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _answer_problem(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, Problem)
    return Response(error.encode(), error.status, error.headers, "application/json")


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: /openapi.json lists what there is"
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    problem = Problem(error.status_code, code, message, headers=error.headers)
    return await _answer_problem(request, problem)


async def _answer_fault(request: Request, error: Exception) -> Response:
    """A fault of ours, which the server logs with its trace."""
    del error
    problem = Problem(500, "internal_error", "the service failed; its log says why")
    return await _answer_problem(request, problem)
