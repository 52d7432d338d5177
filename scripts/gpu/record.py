"""What a run of the slices wrote down, and how parts from several calls become one record."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from meancache_trt.errors import InputError
from meancache_trt.meancache.files import decode_json, write_json

Version = Literal["meancache-trt/gpu-check/1"]
Verdict = Literal["passed", "failed", "measured", "skipped"]


class Check(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that was looked at: its value, its bound, and the reason of the bound.

    `bound` is the largest value that passes or, with `is_lower`, the smallest; None where the value
    is only measured. `note` says what was skipped or went wrong, or how the value came about.
    """

    name: str
    backend: str = ""
    subject: str = ""
    verdict: Verdict
    value: float | None = None
    unit: str = ""
    bound: float | None = None
    is_lower: bool = False
    reason: str = ""
    note: str = ""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one slice found; `started_at` is UTC in ISO 8601."""

    started_at: str
    seconds: float
    checks: tuple[Check, ...]


class Subject(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was examined: a GPU with its driver and libraries, and a commit of this repository."""

    gpu: str
    compute_capability: str
    cuda_version: str
    versions: dict[str, str]
    commit: str


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`docs/gpu/<gpu>-<date>.json`. A rehearsal is one of the script alone, without a GPU."""

    schema: Version = "meancache-trt/gpu-check/1"
    is_rehearsal: bool
    subject: Subject
    parts: dict[str, Part] = {}

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        every = [check for part in self.parts.values() for check in part.checks]
        return [check for check in every if check.verdict == "failed"]


def judged(
    name: str,
    value: float,
    bound: float,
    *,
    reason: str,
    unit: str = "",
    is_lower: bool = False,
    note: str = "",
) -> Check:
    """A check of a value against a bound that has a reason; NaN does not pass."""
    is_passed = value >= bound if is_lower else value <= bound
    return Check(
        name=name,
        verdict="passed" if is_passed else "failed",
        value=float(value),
        unit=unit,
        bound=bound,
        is_lower=is_lower,
        reason=reason,
        note=note,
    )


def equal(name: str, difference: float, *, reason: str) -> Check:
    """A check of a largest difference that must be nought."""
    return judged(name, difference, 0.0, reason=reason)


def measured(name: str, value: float, unit: str, note: str = "", *, backend: str = "") -> Check:
    """A value without a bound."""
    value = float(value)
    return Check(name=name, backend=backend, verdict="measured", value=value, unit=unit, note=note)


def skipped(name: str, why: str) -> Check:
    """Something that was not looked at."""
    return Check(name=name, verdict="skipped", note=why)


def failed(name: str, why: str) -> Check:
    """Something that broke before it had a value."""
    return Check(name=name, verdict="failed", note=why)


def path_of(folder: Path, subject: Subject, date: str) -> Path:
    """Where the record of a GPU and a day lies."""
    slug = re.sub(r"[^a-z0-9]+", "-", subject.gpu.lower()).strip("-")
    return folder / f"{slug}-{date}.json"


def with_part(path: Path, blank: Record, name: str, part: Part) -> Record:
    """Add a part to the record at `path` and write it.

    Of a part of that name, what was found of other backends and stand-ins stays. Raises
    `InputError` where the file is of another GPU, library or commit, since parts of one record have
    to be about one thing.
    """
    record = blank
    if path.exists():
        record = decode_json(path, Record, InputError)
        if (record.subject, record.is_rehearsal) != (blank.subject, blank.is_rehearsal):
            raise InputError(
                f"{path} is of {record.subject}, here is {blank.subject}; give another -o, or "
                "delete it"
            )
    parts = {**record.parts, name: _joined(record.parts.get(name), part)}
    whole = msgspec.structs.replace(record, parts=parts)
    write_json(path, whole)
    return whole


def _joined(before: Part | None, part: Part) -> Part:
    """A part with what an earlier one found of backends and subjects that are not in it."""
    if before is None:
        return part
    places = {(check.backend, check.subject) for check in part.checks}
    kept = [check for check in before.checks if (check.backend, check.subject) not in places]
    if not kept:
        return part
    return msgspec.structs.replace(
        part, checks=(*kept, *part.checks), seconds=before.seconds + part.seconds
    )
