from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from meancache_trt import build as stages
from meancache_trt.errors import InputError
from meancache_trt.export import export_components
from meancache_trt.export.checkpoint import Checkpoint
from tests.export import tiny_hunyuan_video, tiny_qwen_image


def test_unknown_precision_is_refused_before_anything_is_written(
    flux_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"float32, bfloat16, float16, found 'int8'"):
        export_components(flux_folder, tmp_path / "out", height=32, width=48, precisions=["int8"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [tiny_qwen_image, tiny_hunyuan_video])
def test_float16_is_refused_where_the_model_overflows(module, tmp_path: Path) -> None:
    module.tiny_pipeline().save_pretrained(tmp_path / "tiny")
    with pytest.raises(InputError, match=r"overflow float16.*black.*use bfloat16"):
        export_components(
            tmp_path / "tiny", tmp_path / "out", height=32, width=48, precisions=["float16"]
        )
    assert not (tmp_path / "out").exists()


def test_checkpoint_in_bfloat16_gets_a_graph_in_bfloat16(
    pipeline: FluxPipeline, flux_folder: Path, tmp_path: Path
) -> None:
    FluxPipeline.from_pretrained(flux_folder, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "tiny"
    )
    exported = export_components(
        tmp_path / "tiny", tmp_path / "out", height=32, width=48, check_parity=False
    )
    variant = exported.components["transformer/bfloat16"]
    assert variant.precision == "bfloat16"
    assert variant.shared_bytes >= 0.95 * variant.weight_bytes
    assert "transformer/float16" not in exported.components


def test_bundle_without_the_precision_asked_for_is_not_taken_for_it(
    flux_folder: Path, tmp_path: Path
) -> None:
    checkpoint, output = Checkpoint(flux_folder), tmp_path / "tiny.mcb"
    plain = stages.ExportOptions(size=(32, 48), is_parity_checked=False)
    asked = stages.ExportOptions(size=(32, 48), is_parity_checked=False, precisions=("bfloat16",))
    stages.export(checkpoint, output, plain, note=lambda _: None, is_forced=False)
    with pytest.raises(InputError, match="no bfloat16 graphs against some"):
        stages.export(checkpoint, output, asked, note=lambda _: None, is_forced=False)
