"""A small disk of a test's own, in a mount namespace that goes with its process."""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

RunOnDisk = Callable[[str], str]

_MOUNTED = 'mount -t tmpfs -o size=128k tmpfs "$1" && exec "$2" -W error -c "$3" "$1"'

_HELPERS = """
import os, subprocess, sys
from pathlib import Path
from meancache_trt.errors import InputError
from tests.production.made import *

disk = Path(sys.argv[1])

def fill(but_bytes=0):
    '''Leave so much room on the disk, which gives it away by pages of 4096 bytes.'''
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - but_bytes)

def make_read_only():
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
"""


@pytest.fixture
def on_small_disk(tmp_path: Path) -> RunOnDisk:
    """Runs a script, in which `disk` is a file system of 128 KiB, and returns what it printed."""
    (tmp_path / "disk").mkdir()

    def run(script: str) -> str:
        done = subprocess.run(
            [
                *("unshare", "--mount", "--map-root-user", "sh", "-c", _MOUNTED, "sh"),
                *(str(tmp_path / "disk"), sys.executable, _HELPERS + textwrap.dedent(script)),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    if (reason := _why_nothing_can_be_mounted(tmp_path / "disk")) is not None:
        pytest.skip(f"a file system cannot be mounted here: {reason}")
    return run


def _why_nothing_can_be_mounted(folder: Path) -> str | None:
    try:
        command = f"mount -t tmpfs -o size=128k tmpfs {shlex.quote(str(folder))}"
        done = subprocess.run(
            ["unshare", "--mount", "--map-root-user", "sh", "-c", command],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:  # as where there is no unshare
        return str(error)
    return done.stderr if done.returncode else None
