"""The host under valgrind."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

SUPPRESSIONS = Path(__file__).with_name("valgrind.supp")


@dataclass(frozen=True)
class Finding:
    """What valgrind says: its exit status, 0 for nothing found, and its report."""

    status: int
    report: str


def valgrind(program: Path, *arguments: str | Path) -> Finding:
    """Run a program under valgrind: leaks, and reads and writes outside of memory.

    Values that are not initialised are not followed: OpenVINO's generated code loads whole vectors.
    """
    command = [
        "valgrind", "--fair-sched=yes", "--undef-value-errors=no", "--leak-check=full",
        "--errors-for-leak-kinds=definite", "--error-exitcode=9",
        f"--suppressions={SUPPRESSIONS}", str(program), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Finding(done.returncode, done.stderr)
