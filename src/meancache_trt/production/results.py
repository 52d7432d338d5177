"""The results log: one line of JSON for each job that was done or has failed.

The row is what makes a job done. Its files are there before it is written; files without a row are
rendered again.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from meancache_trt.errors import InputError
from meancache_trt.meancache.files import made_directory, sync_folder
from meancache_trt.production.claims import FOLDER, locked
from meancache_trt.production.tickets import Ticket

LOG = "results.jsonl"

Status = Literal["done", "failed"]


class WrittenFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of a job: its path relative to the output directory, size and SHA-256."""

    path: str
    size_bytes: int
    sha256: str


class Result(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What became of a job.

    `ticket_digest` is `Ticket.digest`. `finished_at` is UTC in ISO 8601. `loop_ms` is the denoising
    loop of the whole `batch`. `warnings` say what may be wrong with a picture that was made;
    `error` is why a failed job has none.
    """

    id: str
    status: Status
    ticket_digest: str
    finished_at: str
    prompt: str
    negative_prompt: str | None = None
    seed: int
    schedule: str
    schedule_digest: str
    guidance_scale: float | None = None
    resolution: str
    noise: str
    vae_tiling: bool = False
    bundle_id: str
    runtime: str
    batch: int = 0
    loop_ms: float = 0.0
    files: tuple[WrittenFile, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str | None = None


class ResultsLog:
    """`results.jsonl` of an output directory, which processes and threads share.

    Rows are only ever appended. The latest row of a job counts, but one that is done is final: no
    second one is written. A row is there once its line is whole; the piece of a line that a killed
    process leaves at the end is not read, and the next append replaces it. Of each job the status
    and the place of its row are kept in memory, not the row.

    Raises `InputError` where the directory cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG
        self._lock_path = directory / FOLDER / "results.lock"
        self._known: dict[str, _Known] = {}
        self._owners: dict[str, str] = {}
        self._counts: Counter[Status] = Counter()
        self._end = 0
        self._lines = 0
        with made_directory(self._lock_path.parent):
            pass

    @property
    def done(self) -> int:
        """How many jobs are done, as of the last `refresh` or `append`."""
        return self._counts["done"]

    @property
    def failed(self) -> int:
        """How many jobs have failed and are not done, as of the last `refresh` or `append`."""
        return self._counts["failed"]

    def refresh(self) -> None:
        """Read what was appended since.

        Raises `InputError` for a whole line that is no row, each time until it is mended; for a log
        that is shorter than it was; and for one that cannot be read.
        """
        # Under the lock: a line cannot be read half from a torn one, half from its replacement.
        if self._size() != self._end:
            with locked(self._lock_path):
                self._read_on()

    def status_of(self, ticket: Ticket) -> Status | None:
        """What became of a job, as of the last `refresh` or `append`; None where nothing has yet.

        A job that failed and was changed since has not been tried. Raises `InputError`, naming
        what differs, where another job of this id is done: it may have changed, or the bundle.
        """
        known = self._known.get(ticket.job.id)
        if known is None:
            return None
        if known.ticket_digest == ticket.digest:
            return known.status
        if known.status == "failed":
            return None
        row = self._read_row(known)
        raise InputError(
            f"job {ticket.job.id!r} is done in {self.path}, but as another job: "
            f"{_difference(row, ticket)}; give another output directory, or the job another id"
        )

    def check(self, tickets: Iterable[Ticket]) -> None:
        """Raise `InputError` for the first job that is done as another one; see `status_of`."""
        for ticket in tickets:
            self.status_of(ticket)

    def owner_of(self, path: str) -> str | None:
        """The id of the job whose file that is, by its path in a row; None where none has it."""
        return self._owners.get(path)

    def row(self, job_id: str) -> Result | None:
        """The row of a job that counts, read from the file."""
        known = self._known.get(job_id)
        return None if known is None else self._read_row(known)

    def append(self, results: Sequence[Result]) -> list[Result]:
        """Add rows, all by one write that is synced; return them without those done already.

        Raises `InputError` where they cannot be written, as on a full disk, which leaves the log
        as it was; where the log cannot be read; and where a job is done as another one.
        """
        with locked(self._lock_path):
            self._read_on()
            rows = self._undone(results)
            lines = [msgspec.json.encode(row) + b"\n" for row in rows]
            if lines:
                self._write(b"".join(lines))
            for row, line in zip(rows, lines, strict=True):
                self._note(row, len(line))
        return rows

    def _undone(self, results: Sequence[Result]) -> list[Result]:
        rows: list[Result] = []
        made: dict[str, str] = {}
        for row in results:
            known = self._known.get(row.id)
            digest = known.ticket_digest if known and known.status == "done" else made.get(row.id)
            if digest is None:
                rows.append(row)
                if row.status == "done":
                    made[row.id] = row.ticket_digest
            elif digest != row.ticket_digest:
                raise InputError(
                    f"job {row.id!r} was done in {self.path} meanwhile, as another job; run one "
                    "job file at a time in an output directory"
                )
        return rows

    def _write(self, content: bytes) -> None:
        is_new = not self.path.exists()
        try:
            with self.path.open("ab", buffering=0) as log:
                log.truncate(self._end)  # the piece of a line that a killed process left
                try:
                    _write_all(log, content)
                except BaseException:
                    log.truncate(self._end)
                    if is_new:
                        self.path.unlink()
                    raise
            if is_new:
                sync_folder(self.path.parent)
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; it is as it was before. Check that "
                "the directory is writable and has room, then run again"
            ) from error

    def _read_on(self) -> None:
        size = self._size()
        if size < self._end:
            raise InputError(
                f"{self.path} had {self._end} bytes and has {size}; it may only grow: bring it "
                "back and run again, or remove it to render all jobs again"
            )
        if size == self._end:
            return
        with self._opened() as log:
            log.seek(self._end)
            for line in log:
                if not line.endswith(b"\n"):
                    return
                self._note(self._decoded(line), len(line))

    def _decoded(self, line: bytes) -> Result:
        try:
            return msgspec.json.decode(line, type=Result)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"line {self._lines + 1} of {self.path} is not a row of this log: {error}. Mend "
                "the line, or remove it, so that its job is rendered again; all others are kept"
            ) from error

    def _note(self, row: Result, length: int) -> None:
        before = self._known.get(row.id)
        if before is None or before.status != "done":
            if before is not None:
                self._counts[before.status] -= 1
            self._counts[row.status] += 1
            self._known[row.id] = _Known(row.status, row.ticket_digest, self._end, length)
            self._owners.update((file.path, row.id) for file in row.files)
        self._end += length
        self._lines += 1

    def _read_row(self, known: _Known) -> Result:
        with self._opened() as log:
            log.seek(known.start)
            return msgspec.json.decode(log.read(known.length), type=Result)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BufferedReader]:
        try:
            with self.path.open("rb") as log:
                yield log
        except OSError as error:
            raise InputError(
                f"cannot read {self.path}: {error.strerror}; check its rights, or give another "
                "output directory"
            ) from error

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error


class _Known(NamedTuple):
    status: Status
    ticket_digest: str
    start: int
    length: int


def _write_all(log: FileIO, content: bytes) -> None:
    written = 0
    while written < len(content):  # a disk that runs full takes the first bytes without an error
        written += log.write(content[written:])
    os.fsync(log.fileno())


def _difference(row: Result, ticket: Ticket) -> str:
    job, group = ticket.job, ticket.group
    pairs = {
        "prompt": (row.prompt, job.prompt),
        "negative prompt": (row.negative_prompt or "", ticket.negative_prompt),
        "seed": (row.seed, ticket.seed),
        "guidance scale": (row.guidance_scale, ticket.guidance_scale),
        "resolution": (row.resolution, str(group.resolution.size)),
        "schedule": (row.schedule, group.schedule.name),
        "schedule's digest": (row.schedule_digest, ticket.schedule_digest),
    }
    found = [f"{name} {old!r}, now {new!r}" for name, (old, new) in pairs.items() if old != new]
    others = f"bundle {row.bundle_id!r}, noise {row.noise!r} or VAE tiling {row.vae_tiling}"
    return "; ".join(found) or f"{others}, now something else"
