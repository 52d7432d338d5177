"""The command line, in this process and in others, and what it leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meancache_trt.cli import main

_PATIENCE_S = 120.0
"""For what takes a second or two, on a machine that does much else."""


@dataclass(frozen=True)
class Done:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str

    @property
    def facts(self) -> dict:
        """The document that `--json` prints."""
        return json.loads(self.out)


def call(*arguments: object) -> Done:
    """Run the command line in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the command line in a process of its own, which does not outlive the block."""
    command = [sys.executable, "-W", "error", "-m", "meancache_trt.cli", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> Done:
    """Wait for a process to end by itself."""
    out, err = process.communicate(timeout=_PATIENCE_S)
    return Done(process.returncode, out, err)


def wait_for_rows(directory: Path, count: int) -> None:
    """Wait until so many jobs are in the results log."""
    end = time.monotonic() + _PATIENCE_S
    while len(rows(directory)) < count:
        assert time.monotonic() < end, f"{len(rows(directory))} rows"
        time.sleep(0.005)


def rows(directory: Path) -> list[dict]:
    """The whole rows of the results log."""
    log = directory / "results.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every picture, by its path; anything else that was left fails."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    pictures = [path for path in files if path.suffix in (".png", ".jpg", ".safetensors")]
    others = {path.name for path in files} - {path.name for path in pictures}
    assert all(name == "results.jsonl" or name.endswith((".lock", "run.json")) for name in others)
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pictures
    }


def write_jobs(path: Path, jobs: Sequence[dict]) -> Path:
    """Write a job file."""
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return path
