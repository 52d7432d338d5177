"""Damaged bundles: refused by both hosts, in the same words, and never with a crash."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from scripts.host.mutations import copied, mutate, sealed

from meancache_trt.bundle import Bundle
from meancache_trt.engine.native import NativeBundle, NativeLibrary
from meancache_trt.errors import BundleError, MeanCacheError
from meancache_trt.manifest import LoraRecord
from meancache_trt.meancache import hashing
from meancache_trt.meancache.files import encode_json
from tests.host.conftest import Subject

Edit = Callable[[Path], object]


def replace(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link to another bundle's file keeps its content
    path.write_bytes(content)


def edit_manifest(path: Path, old: str, new: str) -> None:
    file = path / "manifest.json"
    text = file.read_text()
    assert old in text
    manifest = json.loads(text.replace(old, new, 1))
    replace(file, sealed(manifest))


DAMAGES: dict[str, Edit] = {
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "a graph is gone": lambda path: (path / "prepare.onnx").unlink(),
    "a graph is cut": lambda path: replace(path / "prepare.onnx", b"x"),
    "a graph is altered": lambda path: replace(
        path / "prepare.onnx", (path / "prepare.onnx").read_bytes()[:-1] + b"\0"
    ),
    "weights are altered": lambda path: replace(
        weights(path), weights(path).read_bytes()[:-1] + b"\x55"
    ),
    "a link to nothing": lambda path: (
        (path / "prepare.onnx").unlink(),
        (path / "prepare.onnx").symlink_to("elsewhere"),
    ),
    "an edited manifest": lambda path: replace(
        path / "manifest.json",
        (path / "manifest.json").read_bytes().replace(b'"text_tokens": 32', b'"text_tokens": 31'),
    ),
    "an unknown field": lambda path: edit_manifest(path, '"family":', '"more": 1, "family":'),
    "a missing field": lambda path: edit_manifest(path, '"grid": "linspace",', ""),
    "a text for a number": lambda path: edit_manifest(path, '"height": 64', '"height": "64"'),
    "a number for a text": lambda path: edit_manifest(path, '"family": "flux"', '"family": 3'),
    "an unknown role": lambda path: edit_manifest(path, '"role": "noise"', '"role": "hiss"'),
    "an unknown rule of mu": lambda path: edit_manifest(path, '"mu": "line"', '"mu": "curve"'),
    "a foreign schema": lambda path: edit_manifest(path, "bundle/1", "bundle/2"),
    "a LoRA's scale is a text": lambda path: edit_manifest(
        path, '"loras": []', '"loras": [{"name": "a", "sha256": "b", "scale": "c"}]'
    ),
    "no resolutions": lambda path: edit_manifest(
        path, '"resolutions": [', '"resolutions": [], "before": ['
    ),
}


def weights(path: Path) -> Path:
    return next((path / "transformer").glob("*.safetensors"))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_bundles_are_refused_in_the_same_words(
    bundle: Path, library: NativeLibrary, damage: Edit
) -> None:
    damage(bundle)
    with pytest.raises(BundleError) as expected:
        Bundle.open(bundle)
    with pytest.raises(BundleError) as found:
        NativeBundle(bundle, library=library)
    assert str(found.value) == str(expected.value)


def test_a_bundle_with_a_lora_opens(bundle: Path, library: NativeLibrary) -> None:
    manifest = Bundle.open(bundle).manifest
    model = msgspec.structs.replace(
        manifest.export.model, name="a + b", loras=(LoraRecord("b.safetensors", "0" * 64, 0.5),)
    )
    export = msgspec.structs.replace(manifest.export, model=model)
    changed = msgspec.structs.replace(manifest, export=export).sealed()
    replace(bundle / "manifest.json", encode_json(changed))
    assert Bundle.open(bundle).export.model == model
    opened = NativeBundle(bundle, library=library)
    assert opened.info["model_name"] == "a + b"
    opened.close()


def test_missing_directories_are_refused_in_the_same_words(
    tmp_path: Path, library: NativeLibrary
) -> None:
    for path in (tmp_path / "absent.mcb", tmp_path):
        with pytest.raises(BundleError) as expected:
            Bundle.open(path)
        with pytest.raises(BundleError) as found:
            NativeBundle(path, library=library)
        assert str(found.value) == str(expected.value)


def test_a_manifest_that_is_no_json_says_so(bundle: Path, library: NativeLibrary) -> None:
    replace(bundle / "manifest.json", b'{"schema": ')
    with pytest.raises(BundleError, match="not JSON, perhaps truncated: Input data was truncated"):
        NativeBundle(bundle, library=library)


def test_mutated_bundles_are_refused_every_time(
    flux: Subject, library: NativeLibrary, tmp_path: Path
) -> None:
    """A few of the thousand of `scripts/prove host`."""
    chance = random.Random(5)
    for number in range(40):
        target = tmp_path / f"{number}.mcb"
        copied(flux.bundle, target)
        what = mutate(target, chance)
        with pytest.raises(MeanCacheError):
            accepted(target, library, what)


def accepted(path: Path, library: NativeLibrary, what: str) -> None:
    """Open a bundle that should not be; whether it could is told apart from other failures."""
    NativeBundle(path, library=library).close()
    pytest.fail(f"accepted: {what}")


def test_weights_are_hashed_once_for_both_hosts(
    bundle: Path, library: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights(bundle)
    content = path.read_bytes()
    replace(path, content)  # another inode, which nobody has hashed
    NativeBundle(bundle, library=library).close()
    hashed: list[Path] = []
    real = hashing.sha256_of
    monkeypatch.setattr(hashing, "sha256_of", lambda file: hashed.append(file) or real(file))
    assert hashing.verified_sha256(path) == real(path)
    assert hashed == []  # the C++ host's record was taken

    replace(path, content)
    recorded = real(path)
    assert hashing.verified_sha256(path) == recorded
    assert hashed == [path]
    status = path.stat()
    record = hashing._record_path(status)
    known = json.loads(record.read_bytes())
    record.write_text(json.dumps({**known, "sha256": "f" * 64}))
    with pytest.raises(BundleError, match=r"was altered.*found ffffffffffffffff"):
        NativeBundle(bundle, library=library)  # the Python host's record was taken
    NativeBundle(bundle, library=library, is_full_check=True).close()
