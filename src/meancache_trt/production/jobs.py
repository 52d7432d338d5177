"""A job: what one picture or video is to be made of, and the checks that need no bundle.

Jobs come from strangers. Nothing that one names is opened: a schedule is a name in the bundle or a
number, and an id is checked to be one plain component of a path on any file system.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from meancache_trt.errors import InputError
from meancache_trt.meancache.schedule import check_guidance_scale
from meancache_trt.shapes import PictureSize


class Job(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    gc=False,
):
    """One picture or video to render. What is None is the run's default, then the bundle's.

    `id` names it in files and results. `resolution` is WIDTHxHEIGHT, or WIDTHxHEIGHTxFRAMES of a
    video. `schedule` is a name in the bundle or a budget, never a path. `target_psnr` in dB asks
    instead for the bundle's smallest schedule that kept as much of the held-out samples: on
    average, or of 95 in 100 where `percentile` is 5.
    """

    id: str
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    resolution: str | None = None
    frames: int | None = None
    guidance_scale: float | None = None
    schedule: str | int | None = None
    target_psnr: float | None = None
    percentile: float | None = None


@dataclass(frozen=True)
class Limits:
    """What jobs may ask for at most; a whole job file stays in memory, with the jobs that it makes.

    The defaults: `line_bytes` 1 MiB, room for any prompt in any JSON escapes. `prompt_characters`
    10,000, several times what the longest text encoder reads (1,024 tokens). `jobs` 1,000,000,
    about 1 GiB of memory with prompts of 100 characters. `file_bytes` 1 GiB. `pixels`, of all
    frames, 2^28: 3 GiB as float32, twice HunyuanVideo's 1280x720x129.
    """

    line_bytes: int = 1 << 20
    prompt_characters: int = 10_000
    jobs: int = 1_000_000
    file_bytes: int = 1 << 30
    pixels: int = 1 << 28


FIELDS = Job.__struct_fields__
TEXTS = frozenset({"id", "prompt", "negative_prompt", "resolution"})
"""The fields that are text and nothing else."""

_WHOLE = frozenset({"seed", "frames"})
_KINDS: dict[type, str] = {dict: "an object", list: "a list"}
_LONGEST_NUMBER = 20  # digits of 2^64
_LONGEST_NAME = 128
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_LONGEST_NAME - 1}}}")
_BUDGET = re.compile(r"[0-9]{1,9}")
# Names of devices in every directory of Windows, whatever follows a dot.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def make_job(fields: Mapping[str, object], limits: Limits) -> Job:
    """A checked job of fields by name, where None is what was left out.

    A schedule of digits alone is a budget. Raises `InputError` with the first fault.
    """
    for name in fields:
        if name not in FIELDS:
            raise InputError(unknown_field(name))
    for name in ("id", "prompt"):
        if fields.get(name) is None:
            raise InputError(f"{name} is missing; every job has one")
    given = {name: _typed(name, value) for name, value in fields.items() if value is not None}
    job = Job(**given)
    check_job(job, limits)
    return job


def check_job(job: Job, limits: Limits) -> None:
    """Raise `InputError` for what no bundle could render, or a limit forbids."""
    check_id(job.id)
    _check_text("prompt", job.prompt, limits)
    if not job.prompt or job.prompt.isspace():
        raise InputError("prompt is empty; write what the picture shows")
    if job.negative_prompt is not None:
        _check_text("negative_prompt", job.negative_prompt, limits)
    if job.seed is not None and not 0 <= job.seed < 2**64:
        raise InputError(f"seed is 0 to {2**64 - 1} (64 bits), found {shown(job.seed)}")
    if job.guidance_scale is not None:
        check_guidance_scale(job.guidance_scale)
    if job.schedule is not None:
        _check_schedule(job.schedule)
    if job.target_psnr is not None or job.percentile is not None:
        _check_target(job)
    if job.resolution is not None or job.frames is not None:
        size_of(job.resolution, job.frames)


def check_id(name: str) -> None:
    """Raise `InputError` for an id that is not a plain file name on every file system."""
    if _NAME.fullmatch(name) is None or name.endswith("."):
        raise InputError(
            f"an id is 1 to {_LONGEST_NAME} of A-Z a-z 0-9 . _ -, the first a letter or digit and "
            f"the last no dot, because files are named after it; found {shown(name)}"
        )
    if _DEVICE.fullmatch(name):
        raise InputError(f"the id {name!r} names a device on Windows; choose another")


def size_of(
    resolution: str | None, frames: int | None
) -> tuple[int | None, int | None, int | None]:
    """Height, width and frames that a job asks for; None for what it leaves open.

    Raises `InputError` for what is no resolution, or where `frames` contradicts it or is below 1.
    """
    if frames is not None and not 1 <= frames < 10**9:
        raise InputError(f"frames is 1 or more, found {shown(frames)}")
    if resolution is None:
        return None, None, frames
    size = PictureSize.parse(resolution) if len(resolution) <= 60 else None
    if size is None or 0 in (size.height, size.width, size.frames):
        raise InputError(
            "a resolution is WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, each 1 or more; found "
            f"{shown(resolution)}"
        )
    if frames is not None and size.frames not in (None, frames):
        raise InputError(
            f"resolution {resolution!r} and frames {frames} contradict each other; leave frames out"
        )
    return size.height, size.width, size.frames or frames


def unknown_field(name: str) -> str:
    """What to say of a field that jobs do not have."""
    close = difflib.get_close_matches(name[:_LONGEST_NAME].lower(), FIELDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"a job has {', '.join(FIELDS)}"
    return f"unknown field {shown(name)}; {hint}"


def shown(value: object) -> str:
    """A value from outside as it may stand in a message: escaped, and on one short line."""
    if isinstance(value, str):
        return repr(value[:60]) + ("…" if len(value) > 60 else "")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**_LONGEST_NUMBER:
        return f"a number of more than {_LONGEST_NUMBER} digits"
    return _KINDS.get(type(value)) or str(value)


def _typed(name: str, value: object) -> Any:
    """A field's value in the type that `Job` has; a whole number may stand for a number."""
    if name in TEXTS:
        return _expect(name, value, str, "text")
    if name in _WHOLE:
        return _expect(name, value, int, "a whole number")
    if name == "schedule":
        found = _expect(name, value, (str, int), "a name in the bundle or a number of evaluations")
        is_budget = isinstance(found, str) and _BUDGET.fullmatch(found)
        return int(found) if is_budget else found
    number = _expect(name, value, (int, float), "a number")
    if not abs(number) <= 10**_LONGEST_NUMBER:  # nor NaN, which compares with nothing
        raise InputError(f"{name} is a number of ordinary size, found {shown(number)}")
    return float(number)


def _expect(name: str, value: object, kind: type | tuple[type, ...], words: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{name} is {words}, found {shown(value)}")
    return value


def _check_text(name: str, text: str, limits: Limits) -> None:
    if len(text) > limits.prompt_characters:
        raise InputError(
            f"{name} has {len(text):,} characters, the limit is {limits.prompt_characters:,}"
        )
    if "\0" in text:
        raise InputError(f"{name} has a NUL character at {text.index(chr(0))}, which is no text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half of a pair
            raise InputError(
                f"{name} is not Unicode text: half a surrogate pair at character {error.start}"
            ) from error


def _check_schedule(schedule: str | int) -> None:
    if isinstance(schedule, int):
        if schedule < 1:
            raise InputError(f"a budget is 1 or more evaluations, found {shown(schedule)}")
        return
    is_path = "/" in schedule or "\\" in schedule or schedule.lower().endswith(".json")
    if is_path or not 1 <= len(schedule) <= _LONGEST_NAME:
        raise InputError(
            "a job's schedule is a name in the bundle or a number of evaluations, never a file; "
            f"found {shown(schedule)}. Add it to the bundle with `meancache-trt bake`"
        )


def _check_target(job: Job) -> None:
    if job.target_psnr is None:
        raise InputError("percentile says of which pictures target_psnr is; give target_psnr too")
    if job.schedule is not None:
        raise InputError("schedule and target_psnr both choose a schedule; leave one of them out")
    if not 0 < job.target_psnr <= 100:
        raise InputError(f"target_psnr is above 0 and up to 100 dB, found {job.target_psnr:g}")
    if job.percentile not in (None, 5):
        raise InputError(
            "percentile is 5, the only one that schedules have on record beside the mean; found "
            f"{job.percentile:g}"
        )
