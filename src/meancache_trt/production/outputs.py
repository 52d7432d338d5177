"""The files of a rendering, written into the output directory and nowhere else."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from meancache_trt.errors import InputError
from meancache_trt.meancache.files import atomic_write, made_directory
from meancache_trt.media.formats import OutputFormat
from meancache_trt.production.results import WrittenFile
from meancache_trt.rendering import Rendering


@dataclass(frozen=True)
class OutputDirectory:
    """Where files go, and a directory on the same file system for those that are half written."""

    directory: Path
    temporary: Path

    def write(
        self, rendering: Rendering, form: OutputFormat, name: str, job_id: str
    ) -> WrittenFile:
        """Write `name` with the format's suffix, atomically; what was there is replaced.

        `name` is what `NameTemplate.fill` made; its directories are made too. On return the file
        and its name are on the disk. Raises `InputError` where nothing can be written, where the
        path would leave the directory, and as `Rendering.encode` does; then nothing is left.
        """
        return self.write_bytes(rendering.encode(form, job_id), name + form.suffix)

    def write_bytes(self, content: bytes, relative: str) -> WrittenFile:
        """Write a file of these bytes at a relative path, as `write` does."""
        path = self._inside(relative)
        with made_directory(path.parent):
            with atomic_write(path, self.temporary) as temporary:
                temporary.write_bytes(content)
            _sync_directory(path.parent)
        digest = hashlib.sha256(content).hexdigest()
        return WrittenFile(path=relative, size_bytes=len(content), sha256=digest)

    def _inside(self, relative: str) -> Path:
        """The path, after links were followed: one may lead elsewhere, which nobody asked for."""
        path = self.directory / relative
        try:
            folder, root = path.parent.resolve(), self.directory.resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError is a loop, before Python 3.13
            raise InputError(f"cannot write {path}: {error}") from error
        if not folder.is_relative_to(root):
            raise InputError(
                f"{relative!r} would be written to {folder}, outside the output directory "
                f"{root}; remove the link, or choose another name"
            )
        return path


def _sync_directory(directory: Path) -> None:
    """Put names on the disk too: a row of the results must not outlive its file at a power cut."""
    with contextlib.suppress(OSError):  # some network file systems cannot, and need not
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
