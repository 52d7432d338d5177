"""What a run may use of the machine: it stops cleanly before disk or memory run out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from meancache_trt.errors import InputError

MIN_FREE_BYTES = 64 << 20
"""64 MiB: several times the files of a batch, and as much again for the log and other programs."""


@dataclass(frozen=True)
class Guard:
    """Limits that are checked before a chunk is begun.

    `min_free_bytes` stay free on the disk of `directory`; `memory_cap_bytes` is what this process
    may hold resident, None for any amount.
    """

    directory: Path
    min_free_bytes: int = MIN_FREE_BYTES
    memory_cap_bytes: int | None = None

    def check(self) -> None:
        """Raise `InputError` where a limit is reached."""
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise InputError(f"cannot write to {self.directory}: {error.strerror}") from error
        if free < self.min_free_bytes:
            raise InputError(
                f"{self.directory} has {_mib(free)} free, less than the {_mib(self.min_free_bytes)}"
                " that are to stay free; make room and run the same command again: it goes on "
                "where it stopped"
            )
        if self.memory_cap_bytes is None:
            return
        resident = psutil.Process().memory_info().rss
        if resident > self.memory_cap_bytes:
            raise InputError(
                f"this process holds {_mib(resident)} of memory, the cap is "
                f"{_mib(self.memory_cap_bytes)}; raise it, or take a smaller --batch or fewer "
                "--workers, and run again: it goes on where it stopped"
            )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):,.0f} MiB"
