"""Runs whose processes are killed at random moments: in the end each job was done once."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.production.outcome import (
    Picture,
    faults_of,
    pictures_in,
    row_count,
    temporary_files,
)
from scripts.production.process import finished, kill, started, wait_for_rows

from meancache_trt.production.claims import FOLDER
from meancache_trt.production.results import LOG

_STARTUP_SHARE = 4
"""Every so many kills one falls before the first picture of its process."""

_PHASE_PICTURES = 4.0
"""After a row, kills are spread over the time of so many pictures: what a batch goes through."""


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to; `first_row_s` is from the start of its process."""

    pictures: Mapping[str, Picture]
    first_row_s: float
    picture_s: float


@dataclass(frozen=True)
class Inputs:
    """A bundle, a job list of `count` jobs, and the options of each process."""

    bundle: Path
    jobs: Path
    count: int
    options: tuple[str | int | Path, ...] = ()

    def start(self, output: Path) -> subprocess.Popen[str]:
        """One more process of the run in `output`."""
        return started(self.bundle, self.jobs, output, *self.options)


def undisturbed_run(inputs: Inputs, output: Path) -> Undisturbed:
    """Render all in one process."""
    start = time.perf_counter()
    process = inputs.start(output)
    wait_for_rows(process, output, 1)
    first_row_s = time.perf_counter() - start
    finished(process)
    picture_s = (time.perf_counter() - start - first_row_s) / inputs.count
    return Undisturbed(pictures_in(output), first_row_s, picture_s)


def killed_run(
    inputs: Inputs, output: Path, undisturbed: Undisturbed, *, kills: int, seed: int = 0
) -> dict[str, Any]:
    """One process at a time, killed `kills` times and resumed; then what is at fault."""
    chance, seen = random.Random(seed), Counter[str]()
    while seen["kills"] < kills:
        process, before = inputs.start(output), row_count(output)
        left, more = inputs.count - before, kills - seen["kills"]
        if seen["kills"] % _STARTUP_SHARE == 0 or not left:
            latest_s = chance.uniform(0, undisturbed.first_row_s)
            wait_for_rows(process, output, before + 1, latest_s)
        else:
            share = min(2 * left // (more + 1), left // 2)
            wait_for_rows(process, output, before + chance.randint(1, max(share, 1)))
            time.sleep(chance.uniform(0, _PHASE_PICTURES * undisturbed.picture_s))
        _kill(process, output, seen, before)
    finished(inputs.start(output))
    return _result(inputs, output, undisturbed, seen)


def killed_processes(
    inputs: Inputs,
    output: Path,
    undisturbed: Undisturbed,
    *,
    kills: int,
    processes: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Several processes on one directory; killed ones are restarted, but for the last.

    When most is done all but one are killed, which has to take over what the others held.
    """
    chance, seen = random.Random(seed), Counter[str]()
    team = [inputs.start(output) for _ in range(processes)]
    moments = sorted(chance.randrange(inputs.count) for _ in range(kills - processes + 1))
    for rows in moments:
        wait_for_rows(team[0], output, rows)
        time.sleep(chance.uniform(0, _PHASE_PICTURES * undisturbed.picture_s))
        place = chance.randrange(1, processes)
        _kill(team[place], output, seen)
        team[place] = inputs.start(output)
    wait_for_rows(team[0], output, inputs.count - 2 * processes)
    for process in team[1:]:
        _kill(process, output, seen)
    finished(team[0])
    rows = row_count(output)
    finished(inputs.start(output))  # tidies up after those that were killed when all was done
    found = {"processes": processes, **_result(inputs, output, undisturbed, seen)}
    if rows < inputs.count:
        found["faults"].append(f"the one that was left ended with {rows} rows")
    return found


def _kill(
    process: subprocess.Popen[str], output: Path, seen: Counter[str], before: int | None = None
) -> None:
    """Kill a process, and count what it was at as far as its directory tells.

    `before` is the count of rows when it was started, where it is alone.
    """
    is_running = process.poll() is None
    kill(process)
    if not is_running:
        seen["ended before"] += 1
        return
    rows = row_count(output)
    log = output / LOG
    traces = {
        "kills": True,
        "before the run was opened": not (output / FOLDER / "run.json").exists(),
        "before its first row": rows == before,
        "with a file half written": bool(temporary_files(output)),
        "with files that have no row": sum(1 for _ in output.glob("*.png")) > rows,
        "with a torn row": log.exists() and not log.read_bytes().endswith(b"\n"),
    }
    seen.update(name for name, is_so in traces.items() if is_so)


def _result(
    inputs: Inputs, output: Path, undisturbed: Undisturbed, seen: Counter[str]
) -> dict[str, Any]:
    return {
        "jobs": inputs.count,
        "pictures": len(pictures_in(output)),
        "rows": row_count(output),
        **seen,
        "faults": faults_of(output, inputs.jobs, undisturbed.pictures),
    }
