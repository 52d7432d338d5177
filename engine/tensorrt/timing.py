"""The timing cache: how long kernels took on this GPU, so that a later build need not try them.

`tensorrt` times kernels on the GPU at hand. `tensorrt_rtx` times none: since its version 1.2 the
operations on timing caches do nothing (its bindings say so in a DeprecationWarning), what it writes
has no entries, and reading even that back needs a driver, which building ahead of time does not
have. So plans of `tensorrt_rtx` are built without one.

A cache serves the exact version that wrote it, on the same kind of GPU. TensorRT takes any other,
or a damaged one, for empty, and says so in a warning only.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from meancache_trt.engine.tensorrt.library import ErrorLog, Flavour, Library
from meancache_trt.errors import InputError
from meancache_trt.meancache.files import atomic_write, made_directory

Say = Callable[[str], None]


def uses_timing_cache(flavour: Flavour) -> bool:
    """Whether a flavour reads and writes timing caches at all."""
    return flavour == "tensorrt"


def default_path(flavour: Flavour, version: str, capability: str) -> Path:
    """In the user's cache directory, by all that has to be equal for a cache to serve."""
    folder = Path(platformdirs.user_cache_dir("meancache-trt")) / "timing"
    return folder / f"{flavour}-{version}-sm{capability.replace('.', '')}.cache"


class TimingCache:
    """A timing cache that a builder's configuration holds, and the file it belongs to."""

    def __init__(self, library: Library, config: Any, log: ErrorLog, path: Path) -> None:
        self._library, self._config, self._log, self.path = library, config, log, path

    def load(self, say: Say) -> None:
        """Give the configuration what the file has; nothing where there is none yet."""
        content = self._content(say)
        cache = self._readable(content, say) if content else None
        with _quiet():
            if cache is not None and not self._config.set_timing_cache(cache, False):
                say(f"the timing cache {self.path} is of another GPU; it is replaced")
                cache = None
            if cache is None:
                empty = self._config.create_timing_cache(b"")
                self._config.set_timing_cache(empty, False)

    def save(self, say: Say) -> None:
        """Write what the configuration holds now, with what others wrote meanwhile.

        A file that cannot be written is said and is no error: the plan is there.
        """
        try:
            with made_directory(self.path.parent), FileLock(f"{self.path}.lock"):
                content = self._merged()
                with atomic_write(self.path) as temporary:
                    temporary.write_bytes(content)
        except (OSError, InputError) as error:
            say(f"the timing cache was not kept: {error}")

    def _merged(self) -> bytes:
        with _quiet():
            mine = self._config.get_timing_cache()
            theirs = self._content(lambda _: None)
            other = self._readable(theirs, lambda _: None) if theirs else None
            if other is not None:
                mine.combine(other, False)
            return bytes(mine.serialize())

    def _content(self, say: Say) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            say(f"cannot read the timing cache {self.path}: {error.strerror}; building without it")
            return b""

    def _readable(self, content: bytes, say: Say) -> Any:
        """A cache of these bytes, or None, said, where TensorRT takes them for none of its own."""
        self._log.warnings()
        with _quiet():
            cache = self._config.create_timing_cache(content)
        refused = self._log.warnings()
        if cache is not None and not refused:
            return cache
        self._log.reason()  # what it logged belongs to the cache, not to the build
        said = " ".join(refused) or "it does not say why"
        say(
            f"{self._library.flavour} {self._library.version} cannot use the timing cache "
            f"{self.path}, which is damaged, or of another version or GPU ({said}); it is replaced"
        )
        return None


def attach(
    library: Library, config: Any, log: ErrorLog, path: str | None, say: Say
) -> TimingCache | None:
    """The cache of a build whose configuration is `config`; None where `path` is."""
    if path is None:
        return None
    cache = TimingCache(library, config, log, Path(path))
    cache.load(say)
    return cache


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the DeprecationWarning of TensorRT for RTX: what it says is known here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
