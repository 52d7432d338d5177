"""Locks in an output directory, by which processes and threads share the work of one run.

A lock is a lock on an open file, so it goes with its process, however that ends. The files stay
when they are released: they are empty, and a file that is removed while another process waits for
it would no longer keep a third one out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from meancache_trt.errors import InputError
from meancache_trt.meancache.files import made_directory

FOLDER = ".meancache"
"""The directory in an output directory for all that is no output."""

_LOCKS = "locks"
_POLL_S = 0.01  # a hold is a few milliseconds, most of them the sync of an append


class Claim:
    """A name that is held against all other processes and threads, until it is released."""

    def __init__(self, name: str, lock: BaseFileLock) -> None:
        self.name = name
        self._lock = lock

    def release(self) -> None:
        """Let others have it; any thread may. Again is no error."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Claims:
    """Names that one process or thread at a time may hold, of all that use `directory`.

    Raises `InputError` where the directory cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._folder = directory / FOLDER / _LOCKS
        with made_directory(self._folder):
            pass

    def try_claim(self, name: str) -> Claim | None:
        """Hold `name`, or None where another does. Raises `InputError` where locks do not work."""
        lock = _file_lock(self.path(name))
        return Claim(name, lock) if _is_acquired(lock, is_waiting=False) else None

    def path(self, name: str) -> Path:
        """The empty file that is locked."""
        assert Path(name).name == name, name
        return self._folder / f"{name}.lock"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, after waiting for who does; each call is a holder of its own.

    Raises `InputError` where it cannot be made, or locks do not work.
    """
    lock = _file_lock(path)
    _is_acquired(lock, is_waiting=True)
    try:
        yield
    finally:
        lock.release()


def _file_lock(path: Path) -> BaseFileLock:
    # Not of a thread: the stage that ends a chunk is not the one that began it.
    return FileLock(path, thread_local=False, poll_interval=_POLL_S)


def _is_acquired(lock: BaseFileLock, *, is_waiting: bool) -> bool:
    path = Path(lock.lock_file)
    try:
        lock.acquire(blocking=is_waiting)
    except Timeout:
        return False
    except OSError as error:
        raise InputError(
            f"cannot lock {path}: {error.strerror}; give an output directory that is writable and "
            "has room"
        ) from error
    if isinstance(lock, SoftFileLock):  # what filelock turns to, which outlives a killed process
        lock.release()
        raise InputError(
            f"cannot lock {path}: its file system has no file locks, by which the processes of a "
            "run share the work; give an output directory on another one"
        )
    return True
