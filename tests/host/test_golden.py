"""The golden files that the C++ tests read are what the Python host makes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden", ROOT / "scripts" / "write_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["grids.json", "tiles.json"])
def test_golden_files_are_what_their_script_writes(script: ModuleType, name: str) -> None:
    assert (GOLDEN / name).read_text(encoding="utf-8") == script.TEXTS[name]()


def test_golden_folds_are_what_their_script_writes(script: ModuleType) -> None:
    written = json.loads((GOLDEN / "folds.json").read_bytes())
    made = json.loads(script.folds_text())
    assert [case["method"] for case in written] == [case["method"] for case in made]
    for before, now in zip(written, made, strict=True):
        for row, again in zip(before["weights"], now["weights"], strict=True):
            # Logarithms may differ in the last bit between mathematics libraries.
            np.testing.assert_allclose(again, row, rtol=0, atol=1e-12)
