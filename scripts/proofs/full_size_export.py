"""Export the three systems of the paper at full size: memory, new disk, time, shared weights.

Real configurations over sparse safetensors files of the true size (scripts/full_size); each export
is the command that a user would type, in a process of its own. Needs 12 GB of free disk.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.full_size.checkpoint import write_checkpoint
from scripts.full_size.models import MODELS, FullSize

LIMITS = {"peak_bytes": 6 * 2**30, "new_bytes": 200_000_000, "seconds": 600}
_SECOND_SIZE = {"height": 768, "width": 1280}
_COMMAND = (sys.executable, "-m", "meancache_trt.cli")


def main() -> None:
    """Export every model at two sizes, and write what it took."""
    results = {}
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as work:
            results[name] = _prove(Path(work), name, model)
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    record = {
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "limits": LIMITS,
        "models": results,
    }
    target = Path("docs/proof/full-size-export.json")
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    failed = [
        f"{name} {key}"
        for name, result in results.items()
        for key, limit in LIMITS.items()
        for export in result["exports"]
        if export[key] > limit
    ]
    sys.exit(f"over the limit: {', '.join(failed)}" if failed else 0)


def _prove(work: Path, name: str, model: FullSize) -> dict[str, Any]:
    checkpoint = work / name
    write_checkpoint(checkpoint, model)
    sizes = (model.size, {**model.size, **_SECOND_SIZE})
    exports = [
        _export(checkpoint, work / f"{number}.mcb", size) for number, size in enumerate(sizes)
    ]
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in _files(checkpoint)),
        "exports": exports,
    }


def _export(checkpoint: Path, bundle: Path, size: Mapping[str, int]) -> dict[str, Any]:
    options = [text for name, value in size.items() for text in (f"--{name}", str(value))]
    seconds, peak_bytes = _run(["export", str(checkpoint), "-o", str(bundle), *options])
    facts = json.loads(
        subprocess.check_output([*_COMMAND, "inspect", str(bundle), "--json"], text=True)
    )
    return {
        "size": dict(size),
        "seconds": round(seconds, 1),
        "peak_bytes": peak_bytes,
        "new_bytes": sum(
            512 * f.stat().st_blocks for f in _files(bundle) if f.stat().st_nlink == 1
        ),
        "components": {
            component: {key: part[key] for key in ("weight_bytes", "shared_bytes")}
            for component, part in facts["components"].items()
            if part["weight_bytes"]
        },
        "parity": [
            {key: record[key] for key in ("component", "max_abs_error", "tolerance", "sampled")}
            for record in facts["parity"]
        ],
    }


def _run(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command of ours, which must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen([*_COMMAND, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"meancache-trt {' '.join(arguments)} failed")
    return time.perf_counter() - start, 1024 * usage.ru_maxrss


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


if __name__ == "__main__":
    main()
