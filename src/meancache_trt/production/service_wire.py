"""What goes over the wire: OpenAI's images API, as much of it as a bundle can do.

The models are both what requests are checked against and what `/openapi.json` says.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from meancache_trt.bundle import Bundle
from meancache_trt.errors import InputError
from meancache_trt.production.job_files import decode_object
from meancache_trt.production.jobs import Limits, shown

FileFormat = Literal["png", "jpeg", "webp"]
ErrorType = Literal["invalid_request_error", "server_error"]


class Problem(Exception):  # noqa: N818  an answer, not a fault of ours
    """An answer that is an error, in OpenAI's form; `param` is the field at fault."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind: ErrorType = "invalid_request_error" if status < 500 else "server_error"
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)

    def encode(self) -> bytes:
        """The body, in ASCII, so that half a surrogate pair can be told of too."""
        return json.dumps(ErrorBody(error=self.detail).model_dump()).encode()


def _no_number(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):  # to Python 0 is False
        raise ValueError("Input should be false")
    return value


class ImagesRequest(BaseModel):
    """What to render. A field that is null is one that is left out; no other field is known.

    OpenAI's fields for which there is nothing to choose here take their neutral values alone.
    `Offer.request_model` has the limits and choices of a bundle.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: Annotated[
        Literal["b64_json"] | None,
        Field(description="Pictures come in the answer; none is kept to be fetched by a URL."),
    ] = None
    output_format: Annotated[FileFormat | None, Field(description="png by default.")] = None
    output_compression: Annotated[
        int | None,
        Field(ge=1, le=100, description="Quality of jpeg and webp, 100 the best; png has none."),
    ] = None
    user: Annotated[str | None, Field(max_length=512, description="Neither used nor kept.")] = None
    quality: Literal["auto", "standard"] | None = None
    style: None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Annotated[
        Literal["auto", "low"] | None, Field(description="There is none, whatever is asked.")
    ] = None
    stream: Annotated[Literal[False] | None, BeforeValidator(_no_number)] = None
    partial_images: None = None

    seed: Annotated[
        int | None,
        Field(
            ge=0,
            lt=2**64,
            description="Of the first picture; the others count up. Random by default.",
        ),
    ] = None
    negative_prompt: str | None = None
    guidance_scale: Annotated[float | None, Field(ge=0, le=1000)] = None
    schedule: str | int | None = None
    target_psnr: Annotated[
        float | None,
        Field(
            gt=0,
            le=100,
            description="dB: instead of a schedule, the smallest that is known to keep it.",
        ),
    ] = None
    percentile: Annotated[
        Literal[5] | None, Field(description="target_psnr is of 95 in 100 pictures, not the mean.")
    ] = None
    deadline_ms: int | None = None
    priority: Annotated[
        int | None, Field(ge=-100, le=100, description="Higher ones first; 0 by default.")
    ] = None


@dataclass(frozen=True)
class ServiceLimits:
    """What a request may ask for and how long it may take.

    `job` is what the renderer holds each picture against. `body_bytes` holds two prompts of 10,000
    characters in any JSON escapes. `images` is OpenAI's own most. `requests` are under way at a
    time, from the first byte to the answer. A body has to arrive within `body_s`; an answer is
    given within `request_s`, which is also the longest deadline.
    """

    job: Limits = field(default_factory=Limits)
    body_bytes: int = 1 << 20
    images: int = 10
    requests: int = 64
    body_s: float = 20.0
    request_s: float = 300.0


@dataclass(frozen=True)
class Offer:
    """What can be asked for: a model's name, sizes (the default first), schedules.

    `budgets` has the evaluations of each schedule.
    """

    model: str
    bundle: Bundle
    sizes: tuple[str, ...]
    budgets: Mapping[str, int]

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """What a bundle can do, under the name of its directory."""
        return cls(
            model=bundle.directory.resolve().stem,
            bundle=bundle,
            sizes=tuple(dict.fromkeys(map(str, bundle.export.sizes))),
            budgets={name: bundle.schedule(name).budget for name in bundle.schedule_names()},
        )

    def without_paths(self, message: str) -> str:
        """A message that does not say where the bundle lies."""
        return message.replace(str(self.bundle.directory), "BUNDLE")

    def request_model(self, limits: ServiceLimits) -> type[ImagesRequest]:
        """`ImagesRequest` for what there is."""
        longest = limits.job.prompt_characters
        names = (*self.budgets, *sorted(set(self.budgets.values())))
        schedules: Any = Literal[names] if names else None
        choices: dict[str, Any] = {
            "prompt": _required(
                Annotated[str, Field(min_length=1, max_length=longest)], "What the pictures show."
            ),
            "negative_prompt": _optional(
                Annotated[str, Field(max_length=longest)],
                "For models with classifier-free guidance.",
            ),
            "model": _optional(Literal[self.model], "The bundle that is served."),
            "n": _optional(
                Annotated[int, Field(ge=1, le=limits.images)], "Pictures; 1 by default."
            ),
            "size": _optional(
                Literal[("auto", *self.sizes)], "WIDTHxHEIGHT; auto is the bundle's default."
            ),
            "schedule": _optional(
                schedules, "A schedule of the bundle by its name or number of evaluations."
            ),
            "deadline_ms": _optional(
                Annotated[int, Field(ge=1, le=int(1e3 * limits.request_s))],
                "From now; of no use later, and refused at once where it cannot be met.",
            ),
        }
        return pydantic.create_model("ImagesRequest", __base__=ImagesRequest, **choices)


def _required(kind: Any, description: str) -> tuple[Any, Any]:
    return kind, Field(description=description)


def _optional(kind: Any, description: str) -> tuple[Any, Any]:
    return kind | None if kind is not None else None, Field(None, description=description)


def parse_request(body: bytes, model: type[ImagesRequest]) -> ImagesRequest:
    """A checked request. Raises `Problem` with the first fault and the name of its field."""
    try:
        fields = decode_object(body.decode())
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8: {error.reason} at byte {error.start}"
        raise Problem(400, "invalid_json", message) from error
    except InputError as error:
        raise Problem(400, "invalid_json", str(error)) from error
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _problem(error, model) from error


def _problem(error: pydantic.ValidationError, model: type[ImagesRequest]) -> Problem:
    fault = error.errors(include_url=False)[0]
    name = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] == "missing":
        return Problem(400, "missing_field", f"{name} is missing", param=name)
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name[:100], model.model_fields, 1)
        hint = f"did you mean {close[0]}?" if close else "/openapi.json lists those there are"
        return Problem(400, "unknown_field", f"unknown field {shown(name)}; {hint}", param=name)
    message = f"{name}: {fault['msg']}, found {shown(fault['input'])}".removeprefix(": ")
    return Problem(400, "invalid_value", message, param=name or None)


class Image(BaseModel):
    """A picture as base64 of its file, and the seed that makes it again."""

    b64_json: str
    seed: int


class Facts(BaseModel):
    """What the pictures were made with, how long it was predicted to take, and took."""

    schedule: str
    schedule_digest: str
    evaluations: int | None
    guidance_scale: float | None
    bundle_id: str
    predicted_ms: float
    elapsed_ms: float


class ImagesResponse(BaseModel):
    """OpenAI's answer, and what it has no field for under `meancache_trt`."""

    created: Annotated[int, Field(description="Seconds since 1970.")]
    data: list[Image]
    output_format: FileFormat
    size: str
    meancache_trt: Facts


class ServedModel(BaseModel):
    """A bundle, with the evaluations of each of its schedules."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    bundle_id: str
    sizes: list[str]
    schedules: dict[str, int]


class ModelList(BaseModel):
    """What can be asked for as `model`: the one bundle."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class State(BaseModel):
    """Whether the service lives, or takes requests."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What was expected, what was found and what to do; `param` is the field at fault."""

    message: str
    type: ErrorType
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail
