"""Shared fixtures. The bundle is built once a test run, also where tests run in processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import Pipeline

STEPS = 50
OFFICIAL = {
    # Chosen once on the stand-in; any valid nodes would do here.
    "b10": ([0, 1, 3, 7, 14, 21, 28, 35, 42, 49], [1, 2, 1, 1, 1, 1, 1, 1, 4]),
    "b6": ([0, 4, 12, 22, 32, 42], [1, 3, 3, 3, 3]),
}


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the record of hashed files out of the user's cache directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the stand-in, exported and checked for parity, with analytic schedules.

    Shared: do not change it. `bundle` is a copy to do anything with.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared.mcb"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            _export(shared)
    return shared


def _export(path: Path) -> None:
    checkpoint = stages.find_model("standin/flux")
    options = stages.ExportOptions(size=(64, 64))
    bundle = stages.export(checkpoint, path, options, note=lambda _: None, is_forced=False)
    with Pipeline(bundle) as pipeline:
        grid = pipeline.grid(STEPS)
    bundle.add_schedule(bake("euler", grid, range(STEPS), name="full"))
    for name, (nodes, spans) in OFFICIAL.items():
        bundle.add_schedule(bake("official", grid, nodes, spans, name=name))


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own; weights are links to the shared ones, so replace, never edit them."""
    own = tmp_path / "own.mcb"
    shutil.copytree(shared_bundle, own, copy_function=_link_weights)
    return own


def _link_weights(source: str, target: str) -> None:
    copy: Callable[[str, str], object] = (
        os.link if source.endswith(".safetensors") else shutil.copy2
    )
    copy(source, target)


@pytest.fixture(scope="session")
def pipeline(shared_bundle: Path) -> Iterator[Pipeline]:
    """The shared bundle on ONNX Runtime."""
    with Pipeline(Bundle.open(shared_bundle)) as opened:
        yield opened
