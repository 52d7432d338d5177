"""Bundles whose weights are symbolic links, as they are made on another file system."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.engine.onnxruntime import OnnxRuntime
from meancache_trt.errors import BundleError, RuntimeUnavailableError
from meancache_trt.render import Pipeline


@pytest.fixture
def elsewhere(bundle: Path, tmp_path: Path) -> Path:
    """Where the weights of `bundle` really are, under names of their own as in a hub's cache."""
    folder = tmp_path / "blobs"
    folder.mkdir()
    for number, file in enumerate(sorted(bundle.rglob("*.safetensors"))):
        file.rename(folder / f"blob{number}")
        file.symlink_to(folder / f"blob{number}")
    return folder


@pytest.mark.usefixtures("elsewhere")
def test_a_linked_bundle_renders_the_same_bits(bundle: Path, pipeline: Pipeline) -> None:
    with Pipeline(Bundle.open(bundle)) as linked:
        (found,) = linked.render(["a red circle"], schedule="b6")
    (expected,) = pipeline.render(["a red circle"], schedule="b6")
    np.testing.assert_array_equal(found.latent, expected.latent)
    np.testing.assert_array_equal(found.pixels, expected.pixels)


def test_a_link_whose_target_moved_is_named_with_the_target(bundle: Path, elsewhere: Path) -> None:
    (elsewhere / "blob0").rename(elsewhere / "moved")
    with pytest.raises(BundleError, match=r"a link to .*blob0: No such file.*build the bundle"):
        Bundle.open(bundle)


def test_an_altered_target_is_found(bundle: Path, elsewhere: Path) -> None:
    blob = elsewhere / "blob0"
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.unlink()
    blob.write_bytes(content)
    with pytest.raises(BundleError, match="was altered"):
        Bundle.open(bundle)


@pytest.mark.usefixtures("elsewhere")
def test_missing_package_is_told_with_the_remedy(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install onnx.*--weights copy"):
        OnnxRuntime().load(bundle / "transformer" / "model.onnx")
