"""A method is one file: what a contributor adds, in a copy of the package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import meancache_trt
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.meancache.methods import METHODS
from meancache_trt.meancache.sigmas import make_grid

LEANING = '''
"""Half the change since the last node is added (made up for a test)."""

import itertools

from meancache_trt.meancache.folding import interval_widths
from meancache_trt.meancache.methods.base import Method


def _fold(sigmas, nodes, _spans):
    first, *further = interval_widths(sigmas, nodes).tolist()
    return ((first,), *((1.5 * width, -0.5 * width) for width in further))


METHOD = Method("{name}", "leans on the last change", _fold)
'''

# The standard finders alone, because that of an editable install would come before the copy.
PREAMBLE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]
sys.path.insert(0, sys.argv.pop(1))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, without the weights that come with it."""
    copy = tmp_path / "copy" / "meancache_trt"
    ignored = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(Path(meancache_trt.__file__).parent, copy, ignore=ignored)
    return copy


def python(package: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PREAMBLE + code, package.parent, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_a_file_among_the_methods_is_all_that_a_method_takes(
    package: Path, trajectories: Trajectories
) -> None:
    (package / "meancache" / "methods" / "leaning.py").write_text(LEANING.format(name="leaning"))

    def bake(*arguments: object) -> dict[str, Any]:
        code = "from meancache_trt.cli import main; main(sys.argv[1:])"
        done = python(package, code, "bake", "--method", "leaning", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    assert bake("--nodes", "0,2", "--steps", 4)["weights"] == [[-0.5], [-0.75, 0.25]]
    chosen = bake("--calibration", trajectories.directory, "--budget", 3)
    assert chosen["nodes"] == [0, 4, 8]
    widths = np.diff(make_grid(12, shift=3.0).array()[[0, 4, 8, 12]])
    assert chosen["weights"][2] == [1.5 * widths[2], -0.5 * widths[2]]
    assert "leaning" not in METHODS  # of the package itself


def test_two_methods_of_one_name_are_an_error(package: Path) -> None:
    (package / "meancache" / "methods" / "leaning.py").write_text(LEANING.format(name="euler"))
    done = python(package, "import meancache_trt.meancache.methods")
    assert done.returncode == 1
    assert "two files in meancache/methods name a method 'euler'; rename one" in done.stderr


def test_methods_come_in_the_order_of_their_files() -> None:
    assert list(METHODS) == sorted(METHODS)
