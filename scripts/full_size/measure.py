"""What an export takes: time, memory, new disk."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Linux counts to a process's peak what its parent held when it was started, so that a small one
# stands between.
_BETWEEN = """
import json, resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(json.dumps([status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""
_COMMAND = (sys.executable, "-m", "meancache_trt.cli")


def export(
    checkpoint: Path, bundle: Path, size: Mapping[str, int], *options: str
) -> dict[str, Any]:
    """Run `meancache-trt export` in a process of its own; what it took, and what it made.

    `new_bytes` are on disk and no hard link to the checkpoint; `peak_bytes` are resident.
    """
    sizes = [text for name, value in size.items() for text in (f"--{name}", str(value))]
    seconds, peak_bytes = _run(["export", str(checkpoint), "-o", str(bundle), *sizes, *options])
    inspect = [*_COMMAND, "inspect", str(bundle), "--json"]
    facts = json.loads(subprocess.check_output(inspect, text=True))
    states = [file.lstat() for file in files_of(bundle)]
    return {
        "size": dict(size),
        "seconds": round(seconds, 1),
        "peak_bytes": peak_bytes,
        "new_bytes": sum(512 * state.st_blocks for state in states if state.st_nlink == 1),
        "components": {
            name: {key: part[key] for key in ("weight_bytes", "shared_bytes")}
            for name, part in facts["components"].items()
            if part["shared_bytes"]
        },
        "parity": [
            {key: record[key] for key in ("component", "max_abs_error", "tolerance", "blocks")}
            for record in facts["parity"]
        ],
    }


def _run(arguments: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command of ours, which must succeed."""
    start = time.perf_counter()
    between = [sys.executable, "-c", _BETWEEN, *_COMMAND, *arguments]
    status, peak_kib = json.loads(subprocess.check_output(between, text=True))
    if status:
        raise subprocess.CalledProcessError(status, arguments)
    return time.perf_counter() - start, 1024 * peak_kib


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]
