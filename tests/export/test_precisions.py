from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import FluxPipeline

from meancache_trt import build as stages
from meancache_trt.errors import InputError
from meancache_trt.export import export_components
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.manifest import Component
from tests.export import tiny_hunyuan_video, tiny_qwen_image, tiny_z_image


def test_unknown_precision_is_refused_before_anything_is_written(
    flux_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"float32, bfloat16, float16, found 'int8'"):
        export_components(flux_folder, tmp_path / "out", height=32, width=48, precisions=["int8"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [tiny_qwen_image, tiny_hunyuan_video, tiny_z_image])
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


def test_float16_graphs_are_made_on_request_but_not_of_t5(
    flux_folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    exported = export_components(
        flux_folder,
        tmp_path / "out",
        height=32,
        width=48,
        precisions=["float16"],
        check_parity=False,
        report=said.append,
    )
    assert "text_encoder/float16" in exported.components
    assert "text_encoder_2/float16" not in exported.components
    assert "no text_encoder_2/float16 graph: its activations overflow" in said
    exact, rounded = (
        velocity(tmp_path / "out", exported.components[name])
        for name in ("transformer", "transformer/float16")
    )
    # 11 bits of mantissa over three blocks of values near 1; measured 3e-3
    assert 0 < np.abs(rounded - exact).max() < 2e-2


def velocity(directory: Path, component: Component) -> np.ndarray:
    generator = np.random.default_rng(0)
    sizes = {"batch": 1, "image_tokens": 6, "text_tokens": 5}
    feeds = {
        name: generator.uniform(0, 1, record.resolved(sizes)).astype(record.dtype)
        for name, record in component.inputs.items()
    }
    session = onnxruntime.InferenceSession(directory / component.path)
    (found,) = session.run(["velocity"], feeds)
    return found


def test_bundle_without_the_precision_asked_for_is_not_taken_for_it(
    flux_folder: Path, tmp_path: Path
) -> None:
    checkpoint, output = Checkpoint(flux_folder), tmp_path / "tiny.mcb"
    plain = stages.ExportOptions(size=(32, 48), is_parity_checked=False)
    asked = stages.ExportOptions(size=(32, 48), is_parity_checked=False, precisions=("bfloat16",))
    stages.export(checkpoint, output, plain, note=lambda _: None, is_forced=False)
    with pytest.raises(InputError, match="no bfloat16 graphs against some"):
        stages.export(checkpoint, output, asked, note=lambda _: None, is_forced=False)
