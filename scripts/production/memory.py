"""Memory of a process over a long run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scripts.production.inputs import write_jobs
from scripts.production.outcome import row_count
from scripts.production.process import finished, started

_SAMPLE_S = 0.05


def resident_memory(
    bundle: Path, work: Path, *, jobs: int, settled: int = 50, schedule: str = "b2"
) -> dict[str, Any]:
    """Resident bytes of a run's process once `settled` jobs are done, and how they go on.

    `deviation` is the largest from the median, as a share of it; `bytes_a_job` the slope.
    """
    path = write_jobs(work / "jobs.jsonl", jobs, [schedule])
    output = work / "out"
    process = started(bundle, path, output, "--cache", work / "cache")
    samples: list[tuple[int, int]] = []
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            samples.append((row_count(output), watched.memory_info().rss))
        except psutil.NoSuchProcess:
            break
        time.sleep(_SAMPLE_S)
    finished(process)
    done, resident = np.array([pair for pair in samples if settled <= pair[0] < jobs]).T
    median = float(np.median(resident))
    return {
        "jobs": jobs,
        "samples": len(done),
        "median_bytes": median,
        "first_bytes": int(resident[0]),
        "last_bytes": int(resident[-1]),
        "bytes_a_job": float(np.polyfit(done, resident, 1)[0]),
        "deviation": float(np.abs(resident - median).max() / median),
    }
