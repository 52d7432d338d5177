"""Encoded prompts on disk, so that a prompt is encoded once on a machine, and the last in memory.

On disk an entry is one safetensors file, named after its key. Entries do not hold the prompts'
text. Several processes may share a directory: files are written whole, and one that vanishes is a
miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from meancache_trt.errors import InputError
from meancache_trt.meancache.files import write_tensors

Tensors = dict[str, NDArray[Any]]

DEFAULT_CAP_BYTES = 1 << 30
"""1 GiB: 128 prompts of FLUX.1 at 512 text tokens, thousands of the packaged model."""

RECENT_BYTES = 64 << 20
"""64 MiB: eight prompts of FLUX.1 at 512 text tokens, such as negative prompts that many share."""

OFF = "off"

# Ours alone, unfinished ones of a killed process included: a user may name any directory.
_ENTRY = re.compile(r"\.?[0-9a-f]{64}\.safetensors.*")
_DIGEST = "sha256"


class EmbeddingCache:
    """Tensors by key in `directory`, at most `cap_bytes` of them: the longest unused go first.

    A directory that cannot be written keeps nothing new, and one that cannot be read has nothing:
    neither is an error.
    """

    def __init__(self, directory: Path, cap_bytes: int = DEFAULT_CAP_BYTES) -> None:
        self.directory = directory
        self.cap_bytes = cap_bytes

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def get(self, key: str) -> Tensors | None:
        """What `put` kept under `key`, a SHA-256; None where it is not there or was damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError):
            return None
        if metadata.get(_DIGEST) != _digest(tensors):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now, so others go first
        return tensors

    def put(self, key: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Keep tensors under `key`, where the directory can be written."""
        with contextlib.suppress(OSError, InputError):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(key), tensors, {_DIGEST: _digest(tensors)})
            self._trim()

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"

    def _trim(self) -> None:
        entries = []
        for path in self.directory.iterdir():
            if _ENTRY.fullmatch(path.name):
                with contextlib.suppress(OSError):  # another process may have removed it
                    status = path.stat()
                    entries.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in entries) - self.cap_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


class RecentEmbeddings:
    """Tensors by key in memory, at most `cap_bytes` of them: the longest unused go first."""

    def __init__(self, cap_bytes: int = RECENT_BYTES) -> None:
        self.cap_bytes = cap_bytes
        self._entries: OrderedDict[str, Tensors] = OrderedDict()
        self._held = 0

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> Tensors | None:
        """What `put` kept, if it is still there."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: str, tensors: Tensors) -> None:
        """Keep tensors, which nobody may write to, under a new key."""
        self._entries[key] = tensors
        self._held += _size_bytes(tensors)
        while self._held > self.cap_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._held -= _size_bytes(oldest)


def open_cache(directory: Path | str | None) -> EmbeddingCache | None:
    """The cache in a directory; None means the user's cache directory, "off" no cache."""
    if directory == OFF:
        return None
    if directory is None:
        directory = Path(platformdirs.user_cache_dir("meancache-trt")) / "embeddings"
    return EmbeddingCache(Path(directory))


def _size_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
