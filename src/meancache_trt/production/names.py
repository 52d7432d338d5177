"""Names of output files, from a template such as {schedule}/{id}-{seed}.

Nothing in a job may decide where a file goes: the template's own text alone makes directories, and
what a field holds stays within the one part of the path that it stands in.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from string import Formatter
from typing import Self

from meancache_trt.errors import InputError
from meancache_trt.production.tickets import Ticket

_LONGEST_PART = 255 - len(".safetensors")
"""Bytes of a part that leave room for a suffix: Linux and macOS take 255 (NAME_MAX)."""

_LONGEST_NAME = 1000
"""Bytes of the whole, less than the 1024 of a path on macOS, which takes fewest (PATH_MAX)."""

_TEXT = re.compile(r"[A-Za-z0-9._-]+")
_TEXT_SPEC = re.compile(r"(\.[1-9][0-9]{0,2})?")
_NUMBER_SPEC = re.compile(r"(0[1-9][0-9]?)?d?")
_LITERAL_SIGNS = " ._+=,@()-/"
_RESERVED = frozenset({"results.jsonl"})
"""What a run keeps beside its pictures; its hidden files cannot be named at all."""


def slug(prompt: str) -> str:
    """A prompt's words as part of a file's name: lower case, at most 48 letters, digits and "-"."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:48].rstrip("-") or "picture"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


_FIELDS: dict[str, Callable[[Ticket], str | int]] = {
    "id": lambda ticket: ticket.job.id,
    "index": lambda ticket: ticket.index,
    "slug": lambda ticket: slug(ticket.job.prompt),
    "seed": lambda ticket: ticket.seed,
    "schedule": lambda ticket: _safe(ticket.group.schedule.name),
    "width": lambda ticket: ticket.group.resolution.width,
    "height": lambda ticket: ticket.group.resolution.height,
}
_TEXTS = frozenset({"id", "slug", "schedule"})


@dataclass(frozen=True)
class Field:
    """A field of a template, and how it is written: zero-padded numbers, the head of a text."""

    name: str
    spec: str

    def __post_init__(self) -> None:
        if self.name not in _FIELDS:
            raise InputError(
                f"a name template has the fields {', '.join(_FIELDS)}; found {{{self.name}}}"
            )
        pattern, example = (
            (_TEXT_SPEC, "{id:.8}") if self.name in _TEXTS else (_NUMBER_SPEC, "{index:06d}")
        )
        if not pattern.fullmatch(self.spec):
            raise InputError(
                f"expected a field such as {example}, found {{{self.name}:{self.spec}}}"
            )

    def __str__(self) -> str:
        return f"{{{self.name}:{self.spec}}}" if self.spec else f"{{{self.name}}}"

    def fill(self, ticket: Ticket) -> str:
        """The field's text for a job. Raises `InputError` for one that no name may have."""
        value = _FIELDS[self.name](ticket)
        if isinstance(value, str) and not _TEXT.fullmatch(value):
            raise InputError(
                f"a file's name takes letters, digits and . _ - from {{{self.name}}}, found "
                f"{value!r}; change it, or leave the field out of the template"
            )
        return format(value, self.spec)


@dataclass(frozen=True)
class NameTemplate:
    """What files are named: literal texts, in which "/" makes directories, and fields."""

    pieces: tuple[str | Field, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a template, such as {id}, {index:06d}-{slug} or {schedule}/{id}-{seed}.

        Raises `InputError` for an unknown field or format, and where the text around the fields
        would leave the output directory, hide a file or not be a name on every system.
        """
        pieces: list[str | Field] = []
        try:
            for literal, name, spec, conversion in Formatter().parse(text):
                pieces.extend([_check_literal(literal)] if literal else [])
                if name is not None:
                    pieces.append(Field(name, f"!{conversion}" if conversion else spec or ""))
        except ValueError as error:
            raise InputError(f"not a name template: {text!r} ({error})") from error
        _check_path("".join(piece if isinstance(piece, str) else "x" for piece in pieces))
        return cls(tuple(pieces))

    def __str__(self) -> str:
        return "".join(map(str, self.pieces))

    def fill(self, ticket: Ticket) -> str:
        """A job's name: a relative path with "/", without a suffix.

        Raises `InputError` where the job's own texts make none that is safe and short enough.
        """
        filled = (piece if isinstance(piece, str) else piece.fill(ticket) for piece in self.pieces)
        return _check_path("".join(filled))


def check_unique(names: Iterable[tuple[str, str]]) -> None:
    """Check pairs of a job's id and its name, of which no two names may be the same.

    Nor may they differ in letter case alone: some file systems see no difference. Raises
    `InputError` that says which two jobs they are.
    """
    owners: dict[str, str] = {}
    for job, name in names:
        key = unicodedata.normalize("NFC", name.casefold())
        if key in owners:
            raise InputError(
                f"jobs {owners[key]!r} and {job!r} would both be written to {name!r}; put {{id}} "
                "or {index} into the name template"
            )
        owners[key] = job


def _check_literal(text: str) -> str:
    unfit = sorted({sign for sign in text if not (sign.isalnum() or sign in _LITERAL_SIGNS)})
    if unfit:
        raise InputError(
            f"a name template takes letters, digits and {_LITERAL_SIGNS!r} around its fields, "
            f"found {', '.join(map(repr, unfit))}"
        )
    return text


def _check_path(name: str) -> str:
    for part in name.split("/"):
        if not part or part != part.strip(" ") or part[0] == "." or part[-1] == ".":
            raise InputError(
                f"a file's name has no empty or hidden part, no .. and none that ends in a dot or "
                f"space; found {name!r}"
            )
        if len(part.encode()) > _LONGEST_PART:
            raise InputError(
                f"a part of a file's name has at most {_LONGEST_PART} bytes, found "
                f"{len(part.encode())} in {part!r}; shorten it, such as by {{id:.100}}"
            )
        if part.casefold() in _RESERVED:
            raise InputError(f"{part!r} is the run's own file; choose another name")
    if len(name.encode()) > _LONGEST_NAME:
        raise InputError(f"a file's name has at most {_LONGEST_NAME} bytes, found {name!r}")
    return name
