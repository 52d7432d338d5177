"""Kernels that TensorRT for RTX compiled at run time, kept between processes.

One file for each version and GPU, in the user's cache directory. Without it every process compiles
the same kernels again at its first call.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from meancache_trt.engine.tensorrt.library import Library
from meancache_trt.errors import InputError
from meancache_trt.meancache.files import atomic_write

_LOCK_TIMEOUT_S = 10.0  # writing takes far less; the cache is not worth more waiting


class RuntimeCache:
    """The cache of one library on one kind of GPU.

    The native cache is made at its first use, from the configuration of any engine, and shared by
    all contexts. A file that TensorRT rejects is no error: it is said in `problem`, and replaced.

    Attributes:
        problem: what kept the cache from being used or kept; None where nothing did.
    """

    def __init__(
        self, library: Library, product: str, compute_capability: str, directory: Path | None = None
    ) -> None:
        base = directory or Path(platformdirs.user_cache_dir("meancache-trt")) / "tensorrt"
        words = f"{library.flavour}-{library.version}-{product}-{compute_capability}"
        self.path = base / f"{re.sub(r'[^A-Za-z0-9._]+', '-', words)}.cache"
        self.problem: str | None = None
        self._native: Any = None
        self._stored = b""

    def attach(self, config: Any) -> None:
        """Let an engine's runtime configuration use it, where the flavour has such caches."""
        if not hasattr(config, "create_runtime_cache"):
            return
        if self._native is None:
            self._native = config.create_runtime_cache()
            self._load()
        if not config.set_runtime_cache(self._native):
            self.problem = "TensorRT does not use its cache of compiled kernels"

    def save(self) -> None:
        """Keep what was compiled since; the contexts that use it still live."""
        if self._native is None:
            return
        serialized = self._native.serialize()
        compiled = b"" if serialized is None else bytes(memoryview(serialized))
        if compiled in (b"", self._stored):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(), atomic_write(self.path) as temporary:
                temporary.write_bytes(compiled)
            self._stored = compiled
        except (OSError, InputError, Timeout) as error:
            self.problem = f"compiled kernels could not be kept in {self.path}: {error}"

    def close(self) -> None:
        """Free the native cache, after the contexts that use it."""
        self._native = None

    def _load(self) -> None:
        try:
            with self._locked():
                stored = self.path.read_bytes()
        except (OSError, Timeout):  # there is none yet, or it cannot be read
            return
        if stored and self._native.deserialize(stored):
            self._stored = stored
        else:
            self.problem = f"{self.path} was made elsewhere or is damaged; it will be replaced"

    def _locked(self) -> FileLock:
        return FileLock(f"{self.path}.lock", timeout=_LOCK_TIMEOUT_S)
