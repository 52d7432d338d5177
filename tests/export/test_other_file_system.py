"""A bundle on a file system other than the checkpoint's: a real one, in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.errors import BundleError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import Pipeline

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def checkpoint(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny checkpoint, to move about."""
    folder = tmp_path_factory.mktemp("moving") / "tiny-flux"
    shutil.copytree(flux_folder, folder)
    return folder


@pytest.fixture(scope="module")
def elsewhere(checkpoint: Path) -> Iterator[Path]:
    if not MEMORY.is_dir() or MEMORY.stat().st_dev == checkpoint.stat().st_dev:
        pytest.skip(f"{MEMORY} is no file system of its own here")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def export(checkpoint: Path, output: Path) -> Bundle:
    options = stages.ExportOptions(size=(32, 48), text_tokens=12)
    return stages.export(
        Checkpoint(checkpoint), output, options, note=lambda _: None, is_forced=False
    )


def latent(bundle: Bundle) -> np.ndarray:
    with Pipeline(bundle, embedding_cache="off") as pipeline:
        schedule = bake("euler", pipeline.grid(4), range(4), name="full")
        return pipeline.render(["a cat"], schedule=schedule)[0].latent


def test_weights_stay_where_they_are_and_parity_and_pictures_are_the_same(
    checkpoint: Path, elsewhere: Path, tmp_path: Path
) -> None:
    bundle = export(checkpoint, elsewhere / "flux.mcb")
    files = [bundle.directory / file.path for file in bundle.export.weight_files()]
    assert all(file.is_symlink() for file in files)
    assert all(file.is_linked for file in bundle.export.weight_files())
    assert max(record.max_abs_error for record in bundle.export.parity) <= 1e-4
    beside = export(checkpoint, tmp_path / "flux.mcb")
    assert beside.manifest.bundle_id == bundle.manifest.bundle_id
    np.testing.assert_array_equal(latent(bundle), latent(beside))
    checkpoint.rename(checkpoint.with_name("moved"))
    with pytest.raises(BundleError, match=r"a link to .*tiny-flux.*: No such file"):
        Bundle.open(bundle.directory)
    Bundle.open(beside.directory)  # hard links outlive the checkpoint's folder
