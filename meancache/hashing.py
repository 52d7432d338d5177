"""SHA-256 of files, and a record of which large files were already hashed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import platformdirs

from meancache_trt.errors import InputError
from meancache_trt.meancache.files import write_json


def digest_of(content: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises `OSError` where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_sha256(path: Path) -> str:
    """SHA-256 of a file, hashed again only where its inode, size or times changed.

    Multi-gigabyte weights take minutes to hash; the record of the last full hash lies in the
    user's cache directory. Raises `OSError` where the file cannot be read.
    """
    status = path.stat()
    known = _read_record(_record_path(status))
    if known is not None and known.get("state") == _state(status):
        return str(known["sha256"])
    found = sha256_of(path)
    _remember(path, status, found)
    return found


def remember_sha256(path: Path, digest: str) -> None:
    """Record the SHA-256 of a file that was hashed while it was written, for `verified_sha256`.

    Raises `OSError` where the file is missing.
    """
    _remember(path, path.stat(), digest)


def _remember(path: Path, status: os.stat_result, digest: str) -> None:
    record = _record_path(status)
    with contextlib.suppress(OSError, InputError):  # a cache that cannot be written is no error
        record.parent.mkdir(parents=True, exist_ok=True)
        content = {"path": str(path.resolve()), "state": _state(status), "sha256": digest}
        write_json(record, content)


def _state(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _record_path(status: os.stat_result) -> Path:
    # By inode, so that a hard link shares the record of the checkpoint's own file.
    folder = Path(platformdirs.user_cache_dir("meancache-trt")) / "verified"
    return folder / f"{status.st_dev}-{status.st_ino}.json"


def _read_record(record: Path) -> dict[str, object] | None:
    try:
        known = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None
