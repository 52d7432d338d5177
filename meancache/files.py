"""JSON files and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from meancache_trt.errors import InputError, MeanCacheError

T = TypeVar("T")


def read_bytes(path: Path) -> bytes:
    """Read a user's file. Raises `InputError` where it is missing, a directory or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"expected a file at {path}, found nothing; check the path") from None
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; check the path and its rights"
        ) from error


def decode_json(path: Path, kind: type[T], error: type[MeanCacheError]) -> T:
    """Decode a JSON file into `kind`, strictly.

    Raises:
        error: where the text is not JSON or does not have the fields of `kind`; the type's own
            checks may raise others.
        InputError: where the file cannot be read.
    """
    return decode_text(read_bytes(path), kind, error)


def decode_text(text: bytes, kind: type[T], error: type[MeanCacheError]) -> T:
    """As `decode_json`, of what was read already."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as fault:
        raise error(f"not a valid {kind.__name__.lower()} file: {fault}") from fault
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise error(f"not JSON, perhaps truncated: {fault}") from fault


def encode_json(value: object) -> bytes:
    """Readable JSON with a final newline; the same value always gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(encode_json(value))


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, atomically. Raises `InputError` as `atomic_write` does."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(contiguous, temporary, dict(metadata))
        except SafetensorError as error:  # which has no errno; a full disk is what remains
            raise OSError(errno.EIO, str(error)) from error


@contextlib.contextmanager
def made_directory(directory: Path) -> Iterator[None]:
    """Make a directory and its parents; on failure those made here go again, if they are empty.

    Raises `InputError` where it cannot be made.
    """
    ancestors = [directory, *directory.parents]
    made = [path for path in ancestors if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot create {directory}: {error.strerror}; give a directory that is writable"
        ) from error
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def atomic_write(path: Path, directory: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and vanishes on failure.

    It lies in `directory`, which has to be on the same file system; by default beside `path`. The
    bytes are synced before the rename, so that a reader sees the old file or the whole new one.
    Raises `InputError` where the directory is missing, read-only or full.
    """
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name[:32]}.",  # the name may already be as long as names can be
            suffix=path.suffix,
            dir=directory or path.parent,
        )
        os.close(handle)
    except OSError as error:
        raise InputError(_unwritable(path, error)) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise InputError(_unwritable(path, error)) from error
    finally:
        with contextlib.suppress(OSError):  # not there, or the disk has become read-only
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make new files and renames in `folder` last, where the system can sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unwritable(path: Path, error: OSError) -> str:
    return (
        f"cannot write {path}: {error.strerror}; nothing was left behind. Check that the directory "
        "exists, is writable and has room"
    )
