"""What a run left in its directory, and what is wrong with that."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from meancache_trt.production.claims import FOLDER
from meancache_trt.production.results import LOG, Result


@dataclass(frozen=True)
class Picture:
    """SHA-256 of a file, and of its decoded pixels."""

    file: str
    pixels: str


def pictures_in(output: Path) -> dict[str, Picture]:
    """Every finished picture by its path."""
    return {
        str(path.relative_to(output)): _picture(path)
        for path in sorted(output.rglob("*.png"))
        if FOLDER not in path.parts
    }


def rows_of(output: Path) -> list[Result]:
    """The rows of the log; raises where a line is no row.

    What follows the last line's end is the piece that a write left when the disk became read-only
    under it, or the process was killed: the next run drops it.
    """
    log = output / LOG
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return [msgspec.json.decode(line, type=Result) for line in lines]


def row_count(output: Path) -> int:
    """Whole lines of the log, which may be growing."""
    try:
        return (output / LOG).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def temporary_files(output: Path) -> list[Path]:
    """Unfinished files of processes that were killed."""
    hidden = output.rglob(".?*.*")
    scratch = (output / FOLDER).glob("tmp-*/*")
    return sorted({path for path in (*hidden, *scratch) if path.is_file()})


def faults_of(output: Path, jobs: Path, undisturbed: Mapping[str, Picture]) -> list[str]:
    """What is not as it must be after a run: each job once, each bit as in an undisturbed run."""
    return [*_row_faults(output, jobs), *_file_faults(output, undisturbed)]


def _row_faults(output: Path, jobs: Path) -> Iterator[str]:
    ids = [json.loads(line)["id"] for line in jobs.read_text(encoding="utf-8").splitlines()]
    rows = rows_of(output)
    if Counter(row.id for row in rows) != Counter(ids):
        yield f"{len(rows)} rows of {len({row.id for row in rows})} jobs, expected {len(ids)}"
    yield from (f"job {row.id} has failed: {row.error}" for row in rows if row.status != "done")
    yield from unkept_rows(output)


def unkept_rows(output: Path) -> Iterator[str]:
    """Rows whose files are not what they say."""
    for row in rows_of(output):
        for file in row.files:
            path = output / file.path
            content = path.read_bytes() if path.exists() else b""
            if hashlib.sha256(content).hexdigest() != file.sha256:
                yield f"{file.path} is not what its row says"


def _file_faults(output: Path, undisturbed: Mapping[str, Picture]) -> Iterator[str]:
    found = pictures_in(output)
    differing = sum(found.get(name) != picture for name, picture in undisturbed.items())
    if differing or len(found) != len(undisturbed):
        yield f"{len(found)} pictures, {differing} of {len(undisturbed)} missing or other bits"
    left = [*temporary_files(output), *(output / FOLDER).glob("tmp-*")]
    if left:
        yield f"temporary files were left: {', '.join(map(str, left[:5]))}"


def _picture(path: Path) -> Picture:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).tobytes()
    return Picture(_sha256(path.read_bytes()), _sha256(pixels))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
