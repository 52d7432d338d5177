from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from diffusers import FluxTransformer2DModel
from transformers import T5EncoderModel

from meancache_trt.errors import ExportError, RuntimeUnavailableError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Size
from meancache_trt.export.flux import FLUX
from meancache_trt.export.job import Job
from meancache_trt.export.parity import check_parity
from meancache_trt.export.parity_inputs import parity_cases
from meancache_trt.manifest import Exported
from tests.export.tiny_flux import randomize

COMPONENTS = ("transformer", "vae", "scheduler", *FLUX.text_components)


def job(folder: Path, root: Path) -> Job:
    source = Checkpoint(folder)
    return Job(
        source, FLUX, source.configs(COMPONENTS), Size(32, 48, 12), root, "link", lambda _: None
    )


def other_weights(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint whose transformer has other weights."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    network = FluxTransformer2DModel.from_pretrained(other / "transformer")
    randomize(network, seed=9)
    network.save_pretrained(other / "transformer")
    return other


def test_no_case_has_the_exported_size(flux_folder: Path, tmp_path: Path) -> None:
    configs = job(flux_folder, tmp_path).configs
    for height, width in ((16, 40), (72, 32), (24, 24), (32, 48)):
        cases = parity_cases(FLUX, configs, Size(height, width, 12))
        sizes = [(case.symbols["height"], case.symbols["width"]) for case in cases]
        assert len(set(sizes)) == 3
        assert (height, width) not in sizes


def test_graph_of_other_weights_fails(
    flux_folder: Path, export_folder: Path, exported: Exported, tmp_path: Path
) -> None:
    other = other_weights(flux_folder, tmp_path)
    graphs = {name: export_folder / part.path for name, part in exported.components.items()}
    with pytest.raises(ExportError, match=r"transformer differs from diffusers' by .* at most"):
        check_parity(job(other, export_folder), graphs)


def test_text_graph_of_other_weights_fails(
    flux_folder: Path, export_folder: Path, exported: Exported, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(flux_folder, other)
    encoder = T5EncoderModel.from_pretrained(other / "text_encoder_2")
    randomize(encoder, seed=9)
    encoder.save_pretrained(other / "text_encoder_2")
    graphs = {name: export_folder / part.path for name, part in exported.components.items()}
    with pytest.raises(ExportError, match=r"text_encoder_2 differs from .* by .* at most"):
        check_parity(job(other, export_folder), graphs)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))


@pytest.mark.usefixtures("no_memory")
def test_network_that_does_not_fit_is_compared_by_one_block_of_each_kind(
    flux_folder: Path, export_folder: Path, exported: Exported
) -> None:
    graphs = {name: export_folder / part.path for name, part in exported.components.items()}
    before = set(export_folder.rglob("*"))
    records = {
        record.component: record for record in check_parity(job(flux_folder, export_folder), graphs)
    }
    assert records["transformer"].blocks == ("transformer_blocks.0", "single_transformer_blocks.0")
    assert records["text_encoder_2"].blocks == ("encoder.block.0",)
    assert 0 < records["transformer"].max_abs_error <= 1e-4
    assert set(export_folder.rglob("*")) == before
    assert not any(record.blocks for record in exported.parity)


@pytest.mark.usefixtures("no_memory")
def test_sample_of_other_weights_fails(
    flux_folder: Path, export_folder: Path, exported: Exported, tmp_path: Path
) -> None:
    # The sampled graph is traced from `other`, but reads the weights that lie in the export.
    other = other_weights(flux_folder, tmp_path)
    graphs = {name: export_folder / part.path for name, part in exported.components.items()}
    with pytest.raises(ExportError, match=r"transformer differs from diffusers' by .* at most"):
        check_parity(job(other, export_folder), graphs)


def test_missing_runtime_is_told_with_the_remedy(
    flux_folder: Path,
    export_folder: Path,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    graphs = {name: export_folder / part.path for name, part in exported.components.items()}
    with pytest.raises(RuntimeUnavailableError, match=r"meancache-trt\[cpu\]"):
        check_parity(job(flux_folder, export_folder), graphs)


def test_recorded_errors_are_finite_and_within_tolerance(exported: Exported) -> None:
    assert [record.component for record in exported.parity] == [
        "prepare",
        "transformer",
        "vae_decoder",
        "text_encoder",
        "text_encoder_2",
    ]
    for record in exported.parity:
        assert np.isfinite(record.max_abs_error)
        assert record.max_abs_error <= record.tolerance <= 1e-4
        assert len(record.sizes) == 3
        assert record.runtime.startswith("onnxruntime ")
