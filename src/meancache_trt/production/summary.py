"""What a results log comes to, read row by row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from meancache_trt.errors import InputError
from meancache_trt.production.results import Result

_SHARE = re.compile(r"^[0-9]+% of")


@dataclass(frozen=True)
class Summary:
    """Jobs in a results log, and the done ones by schedule and by kind of warning.

    `failures` has a reason for each id that failed and is not done. `first` and `last` are the
    times in the log, UTC in ISO 8601; None where it has no rows.
    """

    done: int
    schedules: dict[str, int]
    warnings: dict[str, int]
    failures: dict[str, str]
    first: str | None
    last: str | None

    @property
    def failed(self) -> int:
        """How many jobs failed."""
        return len(self.failures)


def summarize(log: Path, ids: Collection[str] | None = None) -> Summary:
    """Read a results log; of all its jobs, or of those in `ids`. It may be written meanwhile.

    Raises `InputError` where it cannot be read or a line is no row.
    """
    done = 0
    schedules: Counter[str] = Counter()
    warnings: Counter[str] = Counter()
    failures: dict[str, str] = {}
    first = last = None
    for row in _rows(log):
        if ids is not None and row.id not in ids:
            continue
        first, last = first or row.finished_at, row.finished_at
        if row.status == "failed":
            failures[row.id] = row.error or ""
            continue
        failures.pop(row.id, None)
        done += 1
        schedules[row.schedule] += 1
        warnings.update({_SHARE.sub("part of", text) for text in row.warnings})
    return Summary(done, dict(schedules), dict(warnings), failures, first, last)


def _rows(log: Path) -> Iterator[Result]:
    try:
        with log.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):  # else the piece that a killed process left
                    yield _decoded(log, number, line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot read {log}: {error.strerror}; check its rights") from error


def _decoded(log: Path, number: int, line: bytes) -> Result:
    try:
        return msgspec.json.decode(line, type=Result)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"line {number} of {log} is not a row of this log: {error}") from error
