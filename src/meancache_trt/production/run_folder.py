"""What the processes of a run agree on in its output directory, beside the results log.

results.jsonl              what became of each job: see `results.py`
.meancache/run.json        the settings that all processes share
.meancache/locks/          empty files, locked while a chunk is worked on
.meancache/tmp-NAME/       one process's unfinished files
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from meancache_trt.errors import InputError
from meancache_trt.export.text import TextPrecision
from meancache_trt.meancache.files import decode_json, made_directory, write_json
from meancache_trt.production.claims import FOLDER, Claims, locked
from meancache_trt.rendering import NoiseSource

Version = Literal["meancache-trt/run/1"]

_SCRATCH = "tmp-"


class GroupSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the jobs of a group are cut: jobs a batch, batches a chunk."""

    batch_size: int
    batches_a_chunk: int


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`run.json`: what all processes of a run share, so that a job gives the same file in each.

    `batch_size` is what was asked for, None what is measured. `sizes` are by
    `chunks.group_name`, and are added as groups are met.
    """

    schema: Version = "meancache-trt/run/1"
    bundle_id: str
    runtime: str
    runtime_version: str
    precision: str
    text_precision: TextPrecision = "float32"
    noise: NoiseSource
    vae_tiling: bool
    formats: tuple[str, ...]
    name_template: str
    batch_size: int | None = None
    sizes: dict[str, GroupSizes] = {}


def open_run(
    directory: Path, wanted: RunRecord, *, is_any_version_allowed: bool = False
) -> RunRecord:
    """Make `directory` a run's with the settings `wanted`, or join the run that it holds.

    Returns the run's record; all of it but `sizes` equals `wanted`, or but `runtime_version` where
    any is allowed: pictures of two versions may differ in their last bits.

    Raises `InputError` for a run with other settings, and where the directory cannot be made or
    written, which leaves nothing behind.
    """
    path = _record_path(directory)
    with made_directory(path.parent), _locked_run(path):
        _remove_unfinished(path)
        if path.exists():
            record = _read(path)
            _check_same(path, record, wanted, is_any_version_allowed=is_any_version_allowed)
            return record
        write_json(path, wanted)
        return wanted


def agreed_sizes(directory: Path, group_name: str, measure: Callable[[], GroupSizes]) -> GroupSizes:
    """The sizes of a group that are in the run's record, or those measured here, which go there.

    One process measures, while the others wait for it. Raises `InputError` where the record cannot
    be read or written, and what `measure` does.
    """
    path = _record_path(directory)
    with _locked_run(path):
        record = _read(path)
        if group_name not in record.sizes:
            sizes = {**record.sizes, group_name: measure()}
            record = msgspec.structs.replace(record, sizes=sizes)
            write_json(path, record)
        return record.sizes[group_name]


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """Yield a directory for unfinished files, on the file system of `directory`, that goes again.

    Those of processes that were killed are removed, before and after. Raises `InputError` where it
    cannot be made.
    """
    claims = Claims(directory)
    _remove_abandoned(directory, claims)
    name = f"{_SCRATCH}{uuid.uuid4().hex}"
    own = claims.try_claim(name)  # before there is a directory, which without it were abandoned
    assert own is not None, name
    with own:
        try:
            with made_directory(directory / FOLDER / name):
                yield directory / FOLDER / name
        finally:
            _remove(directory, claims, name)
            _remove_abandoned(directory, claims)


def _remove_abandoned(directory: Path, claims: Claims) -> None:
    for folder in (directory / FOLDER).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(InputError):  # as on a disk that became read-only meanwhile
            if claim := claims.try_claim(folder.name):
                with claim:
                    _remove(directory, claims, folder.name)


def _remove(directory: Path, claims: Claims, name: str) -> None:
    shutil.rmtree(directory / FOLDER / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # likewise; no name comes twice, so nobody waits for it
        claims.path(name).unlink()


def _remove_unfinished(path: Path) -> None:
    """What a process left that was killed while it wrote the record; under the record's lock."""
    for unfinished in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError):
            unfinished.unlink()


@contextlib.contextmanager
def _locked_run(path: Path) -> Iterator[None]:
    lock = path.with_suffix(".lock")
    with locked(lock):
        try:
            yield
        finally:
            if not path.exists():  # as on a full disk: there is no run that it would be the lock of
                lock.unlink(missing_ok=True)


def _record_path(directory: Path) -> Path:
    return directory / FOLDER / "run.json"


def _read(path: Path) -> RunRecord:
    try:
        return decode_json(path, RunRecord, InputError)
    except InputError as error:
        raise InputError(
            f"{path}, the settings of the run in this directory: {error}; give another output "
            "directory"
        ) from error


def _check_same(
    path: Path, found: RunRecord, wanted: RunRecord, *, is_any_version_allowed: bool
) -> None:
    free = {"sizes"} | ({"runtime_version"} if is_any_version_allowed else set())
    differing = [
        f"{name} {getattr(found, name)!r}, this one has {getattr(wanted, name)!r}"
        for name in found.__struct_fields__
        if name not in free and getattr(found, name) != getattr(wanted, name)
    ]
    if differing:
        raise InputError(
            f"the run in {path.parent.parent} was begun with {'; '.join(differing)}. Go on with "
            "its settings, or give another output directory"
        )
