"""Job files: JSON Lines, CSV or plain prompts, read line by line in bounded memory.

    .jsonl .ndjson   one JSON object a line, with the fields of `Job`; UTF-8, blank lines skipped
    .csv             a row of field names, then a job a row; empty cells are what was left out
    .txt, no suffix  one prompt a line, without the blanks around it

A job without an id gets one: in JSON Lines and CSV the number of its line, in text files that of
its prompt counted from 0, with at least four digits. So ids of a file stay as they are where jobs
are added at its end.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from meancache_trt.errors import InputError
from meancache_trt.production.jobs import FIELDS, TEXTS, Job, Limits, make_job, shown, unknown_field


class Line(msgspec.Struct, frozen=True, gc=False):
    """A line of a job file, counted from 1 as editors do: its job, or what is wrong with it."""

    number: int
    job: Job | None
    fault: str = ""

    def __str__(self) -> str:
        return f"line {self.number}: {self.fault or 'a job'}"


_Fields = dict[str, object]
_Row = tuple[int, _Fields | InputError]
"""A line's number, and its fields or its fault."""

_LONGEST_NUMBER = 20
"""Digits of 2^64 − 1, the largest seed. Python takes minutes over millions of digits."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_DECIMAL = re.compile(
    r"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,9})?"
)


def read_jobs(path: Path, limits: Limits | None = None) -> list[Line]:
    """Every job of a file in order, and for each line that is none the reason.

    Raises `InputError` where nothing can be had of the file: it cannot be read, has another suffix,
    no jobs or more than `limits` allow, or a CSV file has no usable row of names.
    """
    rows_of = _READERS.get(path.suffix.lower())
    if rows_of is None:
        raise InputError(
            f"expected jobs in a file named .jsonl, .ndjson, .csv or .txt, found {path}; rename it"
        )
    limits = limits or Limits()
    try:
        with path.open("rb") as file:
            lines = _checked(rows_of(file, limits), limits)
    except FileNotFoundError:
        raise InputError(f"expected a file at {path}, found nothing; check the path") from None
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; check the path and its rights"
        ) from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not lines:
        raise InputError(f"expected a job or prompt a line in {path}, found none; write some")
    return lines


def _checked(rows: Iterator[_Row], limits: Limits) -> list[Line]:
    lines: list[Line] = []
    numbers: dict[str, int] = {}
    for number, fields in rows:
        if len(lines) == limits.jobs:
            raise InputError(f"more than {limits.jobs:,} jobs; split the file")
        try:
            if isinstance(fields, InputError):
                raise fields
            job = make_job(fields, limits)
            _claim(job.id, number, numbers)
            lines.append(Line(number, job))
        except InputError as fault:
            lines.append(Line(number, None, str(fault)))
    return lines


def _claim(name: str, number: int, numbers: dict[str, int]) -> None:
    """Note whose id this is; file systems that ignore case would take both for one file."""
    first = numbers.setdefault(name.lower(), number)
    if first != number:
        raise InputError(f"the id {name!r} is that of line {first}, upper and lower case alike")


def _json_rows(file: BinaryIO, limits: Limits) -> Iterator[_Row]:
    for number, content in _texts(file, limits):
        try:
            if isinstance(content, InputError):
                raise content
            if not content.strip():
                continue
            fields = decode_object(content.rstrip())
            if fields.get("id") is None:
                fields["id"] = _numbered(number)
            yield number, fields
        except InputError as fault:
            yield number, fault


def _prompt_rows(file: BinaryIO, limits: Limits) -> Iterator[_Row]:
    count = number = 0
    for _, content in _texts(file, limits):
        pieces = [content] if isinstance(content, InputError) else content.splitlines()
        for piece in pieces:
            number += 1
            if isinstance(piece, InputError):
                yield number, piece
            elif prompt := piece.strip():
                yield number, {"id": _numbered(count), "prompt": prompt}
            else:
                continue
            count += 1


def _csv_rows(file: BinaryIO, limits: Limits) -> Iterator[_Row]:
    names: list[str] | None = None
    for number, cells in _cell_rows(file, limits):
        if names is None:
            names = _header(number, cells)
        elif isinstance(cells, InputError):
            yield number, cells
        else:
            yield number, _from_cells(names, cells, number)


def _cell_rows(file: BinaryIO, limits: Limits) -> Iterator[tuple[int, list[str] | InputError]]:
    source = _RowLines(_texts(file, limits), limits.line_bytes)
    reader = csv.reader(source, strict=True)
    while True:
        source.begin_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield source.first, source.fault or InputError(f"not CSV: {error}")
        else:
            if any(cells):
                yield source.first, cells


class _RowLines:
    """The lines that make a row, for a reader that goes on with the next row after an error.

    A row is held to the bytes of a line, though it may have several. `first` is the number of its
    first line, `fault` why it ended early.
    """

    def __init__(self, lines: Iterator[tuple[int, str | InputError]], row_bytes: int) -> None:
        self._lines, self._row_bytes = lines, row_bytes
        self.begin_row()

    def begin_row(self) -> None:
        self.first, self._characters = 0, 0
        self.fault: InputError | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, content = next(self._lines)
        self.first = self.first or number
        if isinstance(content, str):
            self._characters += len(content)
            if self._characters <= self._row_bytes:
                return content
            content = _too_long(self._row_bytes)
        self.fault = content
        raise csv.Error


def _header(number: int, cells: list[str] | InputError) -> list[str]:
    where = f"line {number} has to name the fields"
    if isinstance(cells, InputError):
        raise InputError(f"{where}; {cells}")
    names = [cell.strip() for cell in cells]
    for name in names:
        if name not in FIELDS:
            raise InputError(f"{where}; {unknown_field(name)}")
        if names.count(name) > 1:
            raise InputError(f"{where}; two columns are named {name}, leave one out")
    if "prompt" not in names:
        raise InputError(f"{where}; expected one named prompt, found {', '.join(names)}")
    return names


def _from_cells(names: list[str], cells: list[str], number: int) -> _Fields | InputError:
    if len(cells) != len(names):
        return InputError(
            f"expected {len(names)} cells, as the first row has, found {len(cells)}; quote a "
            "prompt that has commas"
        )
    given = zip(names, cells, strict=True)
    fields = {name: _from_cell(name, cell) for name, cell in given if cell}
    return {"id": _numbered(number), **fields}


def _from_cell(name: str, cell: str) -> object:
    """What JSON would have for a cell: numbers as such, all else as text."""
    if name in TEXTS:
        return cell
    bare = cell.strip()
    if _INTEGER.fullmatch(bare):
        return int(bare)
    return float(bare) if name != "schedule" and _DECIMAL.fullmatch(bare) else bare


def _texts(file: BinaryIO, limits: Limits) -> Iterator[tuple[int, str | InputError]]:
    """Lines with their numbers and ends, decoded, or why not; holds one of them at a time."""
    for number, raw in enumerate(_raw_lines(file, limits), start=1):
        if raw is None:
            yield number, _too_long(limits.line_bytes)
            continue
        content = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        try:
            yield number, content.decode()
        except UnicodeDecodeError as error:
            yield number, InputError(f"not UTF-8 text: {error.reason} at byte {error.start}")


def _raw_lines(file: BinaryIO, limits: Limits) -> Iterator[bytes | None]:
    """Lines with their ends; None for one that is too long, of which nothing is kept."""
    total, is_skipping = 0, False
    while piece := file.readline(limits.line_bytes + 1):
        total += len(piece)
        if total > limits.file_bytes:
            raise InputError(f"more than {limits.file_bytes:,} bytes; split the file")
        is_end = piece.endswith(b"\n") or len(piece) <= limits.line_bytes
        if not is_skipping:
            yield piece if is_end else None
        is_skipping = not is_end


def _too_long(line_bytes: int) -> InputError:
    return InputError(f"longer than {line_bytes:,} bytes, the limit of a job")


def _numbered(number: int) -> str:
    return f"{number:04d}"


def decode_object(text: str) -> _Fields:
    """The fields of one JSON object, strictly: no name twice, no NaN, no endless numbers.

    Raises `InputError` for anything else.
    """
    try:
        fields = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError:
        raise InputError("not a job: values within values, hundreds deep") from None
    if not isinstance(fields, dict):
        raise InputError(
            f'expected an object such as {{"prompt": "a red circle"}}, found {shown(fields)}'
        )
    return fields


def _unique(pairs: list[tuple[str, object]]) -> _Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise InputError(f"{shown(twice)} is given twice; leave one out")
    return fields


def _integer(text: str) -> int:
    if len(text) > _LONGEST_NUMBER + 1:
        raise InputError(f"a number of {len(text):,} digits; the largest is {2**64 - 1}")
    return int(text)


def _not_finite(name: str) -> object:
    raise InputError(f"{name} is no number that JSON has; leave it out")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_constant=_not_finite
)

_READERS: dict[str, Callable[[BinaryIO, Limits], Iterator[_Row]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".txt": _prompt_rows,
    "": _prompt_rows,
}
