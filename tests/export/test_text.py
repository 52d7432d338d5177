from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging

from meancache_trt.errors import BundleError, InputError, RuntimeUnavailableError
from meancache_trt.export import FAMILIES, PIPELINE_FOLDER, PromptEncoder
from meancache_trt.manifest import Exported

PROMPTS = ["a red dog", "two cats on a mat"]


@pytest.fixture(scope="module")
def encoder(exported: Exported, export_folder: Path) -> PromptEncoder:
    family = FAMILIES[exported.family]
    return PromptEncoder(family, export_folder / PIPELINE_FOLDER, exported.text_tokens)


def test_bundle_encodes_prompts_as_the_pipeline_does(
    encoder: PromptEncoder, pipeline: FluxPipeline, exported: Exported
) -> None:
    with torch.inference_mode():
        features, pooled, _ = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=12)

    conditioning = encoder.encode(PROMPTS)

    assert np.array_equal(conditioning["encoder_hidden_states"], features.numpy())
    assert np.array_equal(conditioning["pooled_projections"], pooled.numpy())
    inputs = exported.components["transformer"].inputs
    wanted = {name for name, record in inputs.items() if record.role == "conditioning"}
    assert set(conditioning) == wanted
    assert all(value.dtype == np.float32 for value in conditioning.values())


def test_stored_precision_is_that_of_the_checkpoint(
    flux_folder: Path, tmp_path: Path, exported: Exported
) -> None:
    half = FluxPipeline.from_pretrained(flux_folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    family = FAMILIES[exported.family]
    exact = PromptEncoder(family, tmp_path / "half", 12).encode(PROMPTS)
    found = PromptEncoder(family, tmp_path / "half", 12, "checkpoint").encode(PROMPTS)
    with torch.inference_mode():
        features, pooled, _ = half.encode_prompt(PROMPTS, None, max_sequence_length=12)
    assert np.array_equal(found["encoder_hidden_states"], features.float().numpy())
    assert np.array_equal(found["pooled_projections"], pooled.float().numpy())
    assert not np.array_equal(found["encoder_hidden_states"], exact["encoder_hidden_states"])


def test_loading_leaves_the_progress_bars_as_they_were(
    exported: Exported, flux_folder: Path
) -> None:
    shown = diffusers_logging.is_progress_bar_enabled()
    PromptEncoder(FAMILIES[exported.family], flux_folder, 12).encode(PROMPTS)
    assert diffusers_logging.is_progress_bar_enabled() == shown


def test_encoding_nothing_is_an_input_error(encoder: PromptEncoder) -> None:
    with pytest.raises(InputError, match="no prompts"):
        encoder.encode([])


def test_missing_encoders_are_told_with_the_remedy(tmp_path: Path) -> None:
    encoder = PromptEncoder(FAMILIES["flux"], tmp_path / "pipeline", 12)
    with pytest.raises(BundleError, match=r"cannot be loaded: .* build the bundle again"):
        encoder.encode(PROMPTS)


def test_encoding_without_torch_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "meancache_trt.export.flux_torch", raising=False)
    monkeypatch.delattr("meancache_trt.export.flux_torch", raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    encoder = PromptEncoder(FAMILIES["flux"], tmp_path, 12)
    with pytest.raises(RuntimeUnavailableError, match=r"install meancache-trt\[text\]"):
        encoder.encode(PROMPTS)
