"""Targets that run full or cannot be written: one clear error, a whole log, and it goes on after.

usage: disk.py BUNDLE WORK JOBS [MISHAP ...]

Mounts small file systems in a mount namespace of its own; `disk_faults` starts it so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.production.inputs import write_jobs
from scripts.production.kills import Inputs, Undisturbed, undisturbed_run
from scripts.production.outcome import faults_of, row_count, rows_of, unkept_rows
from scripts.production.process import finished, wait_for_rows

_SIZE = "16m"
_ROOM_A_JOB = 12 << 10
"""Bytes of the disk that a picture of the stand-in and its row take, about."""


def disk_faults(bundle: Path, work: Path, jobs: int, mishaps: Sequence[str] = ()) -> dict[str, Any]:
    """What is at fault after each of the mishaps named, or all of them.

    `skipped` says why where nothing can be mounted.
    """
    script = [sys.executable, "-m", "scripts.production.disk", str(bundle), str(work), str(jobs)]
    if reason := why_nothing_can_be_mounted():
        return {"skipped": reason, "faults": []}
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *script, *mishaps],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def why_nothing_can_be_mounted() -> str | None:
    """Why this process may not mount file systems of its own, None where it may."""
    if shutil.which("unshare") is None:
        return "there is no unshare here: it is part of Linux alone"
    if os.geteuid() != 0:
        return "file systems are mounted by root alone; run this part as root"
    done = subprocess.run(
        ["unshare", "--mount", "true"], capture_output=True, text=True, check=False
    )
    return done.stderr.strip() or None


def main() -> None:
    """Try mishaps and print what came of them as JSON."""
    bundle, work, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    chosen = sys.argv[4:] or _MISHAPS
    inputs = Inputs(bundle, write_jobs(work / "jobs.jsonl", count, ["b6"]), count, ("--batch", 2))
    undisturbed = undisturbed_run(inputs, work / "undisturbed")
    found = {name: _tried(_MISHAPS[name], inputs, work, undisturbed) for name in chosen}
    faults = [f"{name}: {fault}" for name, row in found.items() for fault in row["faults"]]
    print(json.dumps({"jobs": count, "mishaps": found, "faults": faults}))


def _tried(
    mishap: Callable[[Inputs, Path], str], inputs: Inputs, work: Path, undisturbed: Undisturbed
) -> dict[str, Any]:
    """What a run says of a mishap, after which it is resumed, and what is at fault then."""
    disk = work / "disk"
    disk.mkdir(exist_ok=True)
    output = disk / "out"
    try:
        said = mishap(inputs, disk)
        rows, faults = row_count(output), list(unkept_rows(output))
        if not said.startswith("error: ") or said.count("error:") != 1 or "Traceback" in said:
            faults.append(f"it said {said!r}")
        finished(inputs.start(output))
        faults += faults_of(output, inputs.jobs, undisturbed.pictures)
        return {"said": said, "rows_then": rows, "rows": len(rows_of(output)), "faults": faults}
    finally:
        subprocess.run(["umount", "--lazy", disk], check=False)


def _runs_full(inputs: Inputs, disk: Path) -> str:
    _mount_memory(disk)
    with _filled_but(disk, inputs.count * _ROOM_A_JOB // 2):
        return _refusal(inputs, disk)


def _is_read_only(inputs: Inputs, disk: Path) -> str:
    _mount_memory(disk)
    with _read_only(disk):
        return _refusal(inputs, disk)


def _is_read_only_later(inputs: Inputs, disk: Path) -> str:
    _mount_memory(disk)
    process = inputs.start(disk / "out")
    wait_for_rows(process, disk / "out", 1)
    process.send_signal(signal.SIGTERM)
    finished(process)
    with _read_only(disk):
        return _refusal(inputs, disk)


def _becomes_read_only(inputs: Inputs, disk: Path) -> str:
    """As at an error of the disk: files that are open for writing do not hinder it."""
    image = disk.with_suffix(".ext4")
    image.write_bytes(bytes(16 << 20))
    _run("mkfs.ext4", "-q", image)
    _run("mount", "-o", "loop,errors=remount-ro", image, disk)
    device = Path(_run("findmnt", "-no", "SOURCE", disk).strip()).name
    process = inputs.start(disk / "out")
    wait_for_rows(process, disk / "out", 1)
    Path("/sys/fs/ext4", device, "trigger_fs_error").write_text("tried", encoding="ascii")
    said = process.communicate()[1].strip()
    _run("umount", disk)
    _run("mount", "-o", "loop", image, disk)
    return said


_MISHAPS: dict[str, Callable[[Inputs, Path], str]] = {
    "runs full": _runs_full,
    "is read-only from the start": _is_read_only,
    "is read-only when it is resumed": _is_read_only_later,
    "becomes read-only": _becomes_read_only,
}


def _mount_memory(disk: Path) -> None:
    _run("mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", disk)


@contextlib.contextmanager
def _filled_but(disk: Path, room_bytes: int) -> Iterator[None]:
    filler = disk / "filler"
    try:
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - room_bytes))
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def _read_only(disk: Path) -> Iterator[None]:
    _run("mount", "-o", "remount,ro", disk)
    try:
        yield
    finally:
        _run("mount", "-o", "remount,rw", disk)


def _refusal(inputs: Inputs, disk: Path) -> str:
    """What a process says that cannot go on."""
    return inputs.start(disk / "out").communicate()[1].strip()


def _run(*command: str | Path) -> str:
    return subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True
    ).stdout


if __name__ == "__main__":
    main()
