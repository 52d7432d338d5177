"""Runs in processes of their own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.production.outcome import row_count

_ROOT = Path(__file__).parents[2]
_POLL_S = 0.01


def started(
    bundle: Path, jobs: Path, output: Path, *options: str | int | Path, cache: Path | None = None
) -> subprocess.Popen[str]:
    """A process that renders `jobs`, with `cache` for the user's cache directory."""
    command = ["-m", "scripts.production.runner", bundle, jobs, output, *options]
    own = {} if cache is None else {"XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, **own},
    )


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The snapshot that a process printed at its end. Raises where it failed."""
    printed, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a run ended with status {process.returncode}: {errors}")
    snapshot: dict[str, Any] = json.loads(printed)
    return snapshot


def kill(process: subprocess.Popen[str]) -> None:
    """End it by SIGKILL and wait until it is gone."""
    process.kill()
    process.communicate()


def wait_for_rows(
    process: subprocess.Popen[str], output: Path, rows: int, latest_s: float = math.inf
) -> None:
    """Return once the log has so many rows, the process has ended or the time is over."""
    end = time.monotonic() + latest_s
    while row_count(output) < rows and process.poll() is None and time.monotonic() < end:
        time.sleep(_POLL_S)
