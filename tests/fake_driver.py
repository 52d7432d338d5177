"""A libcuda.so.1 of our own, compiled for a test, so that the real calls are made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = Path(__file__).parent / "fake_driver.c"


def driver_environment(folder: Path, *macros: str) -> dict[str, str]:
    """Compile a driver with some macros; an environment in which it is found before any other.

    Skips the test where there is no C compiler.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler named cc")
    command = [compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", _SOURCE]
    subprocess.run([*command, *(f"-D{macro}" for macro in macros)], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}
