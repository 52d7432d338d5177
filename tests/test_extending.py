"""`export` and `build` where the output is already a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from meancache_trt import build as stages
from meancache_trt import bundle as bundles
from meancache_trt import standins
from meancache_trt.bundle import Bundle
from meancache_trt.cli import main
from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.record import RecordOptions
from meancache_trt.shapes import PictureSize


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the stand-in, to alter."""
    return Path(shutil.copytree(standins.path("flux"), tmp_path / "flux"))


def export(checkpoint: Path, output: Path, *further: str) -> Bundle:
    options = stages.ExportOptions(
        size=(64, 64), further_sizes=tuple(map(PictureSize.parse, further))
    )
    return stages.export(
        Checkpoint(checkpoint), output, options, note=lambda _: None, is_forced=False
    )


def test_a_copy_of_the_checkpoint_is_the_same(checkpoint: Path, bundle: Path) -> None:
    assert [str(size) for size in export(checkpoint, bundle, "96x64").export.sizes] == [
        "64x64",
        "96x64",
    ]


def test_another_scheduler_is_another_checkpoint(checkpoint: Path, bundle: Path) -> None:
    path = checkpoint / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 7.0}))
    with pytest.raises(InputError, match=r"scheduler_config\.json against the checkpoint's"):
        export(checkpoint, bundle, "96x64")


@pytest.mark.parametrize(
    ("part", "place"), [("vae", "vae_decoder"), ("text_encoder_2", "pipeline/text_encoder_2")]
)
def test_other_weights_beside_the_transformer_are_another_checkpoint(
    checkpoint: Path, bundle: Path, part: str, place: str
) -> None:
    (file,) = (checkpoint / part).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{place}/.*safetensors against the checkpoint's"):
        export(checkpoint, bundle, "96x64")


def test_what_a_bundle_has_already_needs_no_lock(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)
    monkeypatch.setattr(bundles, "FileLock", None)  # it would be called
    assert opened.extend(opened.export.resolutions) == []


def test_build_records_at_the_text_length_of_the_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RecordOptions] = []

    def record(_: Any, __: Any, options: RecordOptions, **___: Any) -> None:
        seen.append(options)
        raise InputError("enough")

    monkeypatch.setattr(stages, "record_pipeline", record)
    with pytest.raises(SystemExit):
        main(["build", "standin/flux", "-o", str(bundle)])
    assert seen[0].text_tokens == Bundle.open(bundle).export.text_tokens
