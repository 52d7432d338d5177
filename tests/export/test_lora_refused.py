"""LoRA files that cannot be merged: refused by name and shape, with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meancache_trt.errors import ExportError, InputError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.lora import Lora
from meancache_trt.export.lora_merge import merge
from tests.export import tiny_wan
from tests.export.families import TINY
from tests.export.lora_files import (
    Tensors,
    diffusers_names,
    kohya_names,
    one_layer,
    pair,
    pairs,
    write,
)


def merge_all(checkpoint: Path, lora: Lora) -> None:
    dict(merge(Checkpoint(checkpoint, (lora,)), "transformer"))


def refusal(checkpoint: Path, file: Path) -> str:
    with pytest.raises(InputError) as refused:
        merge_all(checkpoint, Lora(file))
    assert str(refused.value).startswith(str(file))
    return str(refused.value)


def test_a_lora_of_another_model_is_refused_by_name(flux_folder: Path, tmp_path: Path) -> None:
    network = TINY["qwen_image"]().transformer
    modules = ("transformer_blocks.1.attn.to_q", "img_in")
    file = write(tmp_path / "a.safetensors", diffusers_names(pairs(network, modules)))
    message = refusal(flux_folder, file)
    assert "2 of its 2 layers are not in the transformer of tiny-flux" in message
    assert "transformer.img_in, transformer.transformer_blocks.1.attn.to_q" in message
    assert "FluxTransformer2DModel" in message


@pytest.mark.parametrize(
    "layer", ["lora_unet_double_blocks_99_img_attn_proj", "lora_unet_input_blocks_1_1_proj_in"]
)
def test_a_kohya_layer_that_diffusers_does_not_know_is_refused_by_name(
    flux_folder: Path, tmp_path: Path, layer: str
) -> None:
    down, up = pair(64, 64)
    tensors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    assert layer in refusal(flux_folder, write(tmp_path / "a.safetensors", tensors))


def test_a_lora_of_another_size_is_refused_by_shape(flux_folder: Path, tmp_path: Path) -> None:
    down, up = pair(3072, 4096)  # FLUX.1-dev's
    file = write(tmp_path / "a.safetensors", diffusers_names({"context_embedder": (down, up)}))
    message = refusal(flux_folder, file)
    assert "context_embedder.weight of the transformer is (64, 48)" in message
    assert "found a change of (3072, 4096)" in message


def test_a_smaller_lora_is_not_padded(flux_folder: Path, tmp_path: Path) -> None:
    # diffusers pads such a one with zeros
    file = write(tmp_path / "a.safetensors", diffusers_names({"context_embedder": pair(64, 24)}))
    assert "found a change of (64, 24)" in refusal(flux_folder, file)


def test_fused_projections_of_another_size_are_refused_by_shape(
    flux_folder: Path, tmp_path: Path
) -> None:
    down, up = pair(3 * 3072 + 12288, 3072)
    tensors = kohya_names({"single_blocks.0.linear1": (down, up)}, alpha=2.0)
    message = refusal(flux_folder, write(tmp_path / "a.safetensors", tensors))
    assert "single_transformer_blocks.0.attn.to_q.weight of the transformer is (64, 64)" in message
    assert "found a change of (3072, 3072)" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.context_embedder.lora_magnitude_vector", (64,)),
        ("transformer.context_embedder.lora_B.bias", (64,)),
        ("lora_unet_double_blocks_0_img_attn_proj.hada_w1_a", (64, 2)),
        ("lora_unet_double_blocks_0_img_attn_proj.dora_scale", (64, 1)),
        ("diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale.diff", (32,)),
    ],
)
def test_what_is_no_lora_is_refused_by_name(
    flux_folder: Path, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    tensors = one_layer() | {name: torch.ones(shape)}
    message = refusal(flux_folder, write(tmp_path / "a.safetensors", tensors))
    assert f"1 tensors that are no LoRA's, such as {name}" in message


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "none of one"),
        ({"transformer.x.lora_A.weight": torch.ones(2, 4)}, "found (2, 4)"),
        (
            {
                "transformer.x.lora_A.weight": torch.ones(2, 4),
                "transformer.x.lora_B.weight": torch.ones(4, 3),
            },
            "found (2, 4), (4, 3)",
        ),
        (
            {
                "transformer.x.lora_A.weight": torch.ones(2, 4, 1, 1),
                "transformer.x.lora_B.weight": torch.ones(4, 2, 1, 1),
            },
            "found (2, 4, 1, 1), (4, 2, 1, 1)",
        ),
    ],
    ids=["empty", "half a pair", "ranks", "convolution"],
)
def test_a_lora_that_is_not_whole_is_refused(
    flux_folder: Path, tmp_path: Path, tensors: Tensors, message: str
) -> None:
    assert message in refusal(flux_folder, write(tmp_path / "a.safetensors", tensors))


def test_a_lora_without_effect_is_refused(flux_folder: Path, tmp_path: Path) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in one_layer().items()}
    message = refusal(flux_folder, write(tmp_path / "a.safetensors", tensors))
    assert "changes nothing in the transformer" in message
    assert "1 layers of zeros" in message


def test_a_weight_under_two_names_is_refused(flux_folder: Path, tmp_path: Path) -> None:
    down, up = pair(64, 64)
    kohya = kohya_names({"double_blocks.0.img_attn_proj": (down, up)}, alpha=2.0)
    tensors = kohya | diffusers_names({"transformer_blocks.0.attn.to_out.0": (down, up)})
    message = refusal(flux_folder, write(tmp_path / "a.safetensors", tensors))
    assert "transformer_blocks.0.attn.to_out.0.weight twice" in message


def test_a_file_that_is_no_safetensors_is_refused(flux_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"PK\x03\x04 a pickle of torch.save" * 9)
    with pytest.raises(ExportError, match=r"a\.safetensors is not a safetensors file"):
        merge_all(flux_folder, Lora(file))


def test_a_lora_for_a_model_of_two_transformers_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_wan.tiny_a14b()
    pipeline.save_pretrained(tmp_path / "a14b")
    layers = pairs(pipeline.transformer, ["blocks.0.attn1.to_q"])
    lora = Lora(write(tmp_path / "a.safetensors", diffusers_names(layers)))
    with pytest.raises(InputError, match="expected a model of one transformer, found two in a14b"):
        merge_all(tmp_path / "a14b", lora)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(
    flux_folder: Path, tmp_path: Path, value: float
) -> None:
    tensors = one_layer()
    tensors["transformer.context_embedder.lora_B.weight"][0, 0] = value
    message = refusal(flux_folder, write(tmp_path / "a.safetensors", tensors))
    assert "values that are not finite, in transformer.context_embedder.lora_B.weight" in message


def test_a_lora_whose_alpha_is_0_changes_nothing(flux_folder: Path, tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 0})}
    file = write(tmp_path / "a.safetensors", one_layer(), header)
    assert "changes nothing" in refusal(flux_folder, file)


@pytest.mark.parametrize(
    "entry", [{"lora_alpha": "strong"}, {"alpha_pattern": [1]}, {"alpha_pattern": {"(": 1}}]
)
def test_a_header_whose_alphas_cannot_be_read_is_refused(
    flux_folder: Path, tmp_path: Path, entry: dict[str, object]
) -> None:
    named = {f"transformer.{key}": value for key, value in entry.items()}
    file = write(
        tmp_path / "a.safetensors", one_layer(), {"lora_adapter_metadata": json.dumps(named)}
    )
    assert "damaged header: its alphas cannot be read" in refusal(flux_folder, file)
