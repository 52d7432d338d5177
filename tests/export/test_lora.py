"""LoRA files read, refused and merged, against diffusers' own merging on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.lora import Lora
from meancache_trt.export.lora_merge import merge, merge_into, write_overlay
from meancache_trt.export.pipeline import identify
from meancache_trt.export.safetensors_file import read_tensors
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

TOLERANCE = 1e-6
"""Rounding of float32 where factors are multiplied in another order; weights are of the order 1."""

MODULES = {
    "flux": (
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.ff.net.2",
        "single_transformer_blocks.1.proj_mlp",
        "context_embedder",
    ),
    "qwen_image": (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.1.img_mlp.net.2",
        "img_in",
    ),
    "hunyuan_video": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"),
    "z_image": ("layers.0.attention.to_q", "layers.1.feed_forward.w2"),
    "sd3": ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2"),
    "wan": ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2"),
    "flux2": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out"),
}
SCALE = 0.7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family, made at its first use."""
    root = tmp_path_factory.mktemp("checkpoints")

    class Folders(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            TINY[family]().save_pretrained(root / family)
            self[family] = root / family
            return self[family]

    return Folders()


@pytest.fixture
def flux(folders: dict[str, Path]) -> Path:
    return folders["flux"]


def merged(checkpoint: Path, *loras: Lora) -> Tensors:
    return dict(merge(Checkpoint(checkpoint, loras), "transformer"))


def by_diffusers(family: str, *loras: Lora) -> Tensors:
    """Every weight of the transformer after `load_lora_weights` and `fuse_lora`."""
    pytest.importorskip("peft", reason="diffusers loads LoRAs by peft")
    pipeline: Any = TINY[family]()
    names = [f"lora{number}" for number, _ in enumerate(loras)]
    for name, lora in zip(names, loras, strict=True):
        pipeline.load_lora_weights(lora.path.parent, weight_name=lora.path.name, adapter_name=name)
    pipeline.set_adapters(names, [lora.scale for lora in loras])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    weights: Tensors = pipeline.transformer.state_dict()
    return weights


def assert_equal(found: Tensors, family: str, expected: Tensors) -> None:
    """The changed weights are `found`, and no others changed."""
    before = TINY[family]().transformer.state_dict()
    changed = {name for name, tensor in expected.items() if not tensor.equal(before[name])}
    assert changed == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", MODULES)
def test_weights_are_those_that_diffusers_fuses(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    layers = pairs(TINY[family]().transformer, MODULES[family])
    lora = Lora(write(tmp_path / "a.safetensors", diffusers_names(layers)), SCALE)
    found = merged(folders[family], lora)
    assert found.keys() == {f"{module}.weight" for module in MODULES[family]}
    assert_equal(found, family, by_diffusers(family, lora))


def test_kohya_names_and_fused_projections_of_flux(flux: Path, tmp_path: Path) -> None:
    layers = {
        "double_blocks.0.img_attn_qkv": pair(3 * 64, 64, rank=4),
        "double_blocks.0.txt_attn_proj": pair(64, 64, seed=1),
        "double_blocks.0.img_mlp_0": pair(256, 64, seed=2),
        "single_blocks.1.linear2": pair(64, 64 + 256, seed=3),
    }
    lora = Lora(write(tmp_path / "a.safetensors", kohya_names(layers, alpha=3.0)), SCALE)
    found = merged(flux, lora)
    assert len(found) == 6
    assert_equal(found, "flux", by_diffusers("flux", lora))


def test_xlabs_names_of_flux(flux: Path, tmp_path: Path) -> None:
    (down, up), layer = pair(3 * 64, 64), "double_blocks.0.processor.qkv_lora2"
    tensors = {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
    lora = Lora(write(tmp_path / "a.safetensors", tensors), SCALE)
    found = merged(flux, lora)
    assert len(found) == 3
    assert_equal(found, "flux", by_diffusers("flux", lora))


def test_kohya_names_of_qwen_image(folders: dict[str, Path], tmp_path: Path) -> None:
    layers = pairs(TINY["qwen_image"]().transformer, MODULES["qwen_image"])
    lora = Lora(write(tmp_path / "a.safetensors", kohya_names(layers, alpha=3.0)), SCALE)
    found = merged(folders["qwen_image"], lora)
    assert_equal(found, "qwen_image", by_diffusers("qwen_image", lora))


def test_alphas_of_names_without_a_prefix_count(folders: dict[str, Path], tmp_path: Path) -> None:
    layers = pairs(TINY["qwen_image"]().transformer, MODULES["qwen_image"])
    named = {
        name.removeprefix("transformer."): tensor
        for name, tensor in diffusers_names(layers).items()
    }
    named |= {f"{module}.alpha": torch.tensor(8.0) for module in layers}
    lora = Lora(write(tmp_path / "a.safetensors", named))
    expected = by_diffusers("qwen_image", lora)
    assert_equal(merged(folders["qwen_image"], lora), "qwen_image", expected)


@pytest.mark.parametrize("is_rank_stabilised", [False, True])
def test_alphas_of_the_header_count(flux: Path, tmp_path: Path, is_rank_stabilised: bool) -> None:
    first, *others = MODULES["flux"]
    layers = pairs(TINY["flux"]().transformer, MODULES["flux"])
    header = {
        "transformer.r": 2,
        "transformer.lora_alpha": 5,
        "transformer.alpha_pattern": {first: 9},
        "transformer.use_rslora": is_rank_stabilised,
        "transformer.target_modules": [first, *others],
    }
    tensors, entries = diffusers_names(layers), {"lora_adapter_metadata": json.dumps(header)}
    lora = Lora(write(tmp_path / "a.safetensors", tensors, entries), SCALE)
    assert_equal(merged(flux, lora), "flux", by_diffusers("flux", lora))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # there are two, as meant
def test_several_add_up(flux: Path, tmp_path: Path) -> None:
    transformer = TINY["flux"]().transformer
    one = diffusers_names(pairs(transformer, MODULES["flux"][:2]))
    other = diffusers_names(pairs(transformer, MODULES["flux"][1:], rank=3))
    loras = (
        Lora(write(tmp_path / "a.safetensors", one), 0.5),
        Lora(write(tmp_path / "b.safetensors", other), -1.5),
    )
    found = merged(flux, *loras)
    assert len(found) == 4
    assert_equal(found, "flux", by_diffusers("flux", *loras))


@pytest.mark.parametrize(
    "names",
    [
        ("lora_unet_txt_in.lora_down.weight", "lora_unet_txt_in.lora_up.weight"),
        ("diffusion_model.txt_in.lora_down.weight", "diffusion_model.txt_in.lora_up.weight"),
        ("context_embedder.lora_A.weight", "context_embedder.lora_B.weight"),
        (
            "transformer.context_embedder.lora.down.weight",
            "transformer.context_embedder.lora.up.weight",
        ),
    ],
    ids=["Kohya", "ComfyUI", "no prefix", "former diffusers"],
)
def test_layers_that_diffusers_drops_or_named_otherwise_are_merged(
    flux: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    before = TINY["flux"]().transformer.context_embedder.weight
    down, up = pair(64, 48)
    alpha = {f"{names[0].rpartition('.lora')[0]}.alpha": torch.tensor(3.0)}
    tensors = {**dict(zip(names, (down, up), strict=True)), **alpha}
    found = merged(flux, Lora(write(tmp_path / "a.safetensors", tensors), SCALE))
    expected = before.detach() + SCALE * 3 / 2 * up @ down
    torch.testing.assert_close(found, {"context_embedder.weight": expected}, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("stored", "kept"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_half_precision_is_merged_in_float32_and_rounded_once(
    tmp_path: Path, stored: torch.dtype, kept: torch.dtype
) -> None:
    pipeline: Any = TINY["flux"]()
    pipeline.transformer.to(stored)
    pipeline.save_pretrained(tmp_path / "half")
    before = pipeline.transformer.context_embedder.weight.float()
    tensors = {name: tensor.to(stored) for name, tensor in one_layer().items()}
    (down, up) = (tensor.float() for tensor in tensors.values())
    checkpoint = Checkpoint(tmp_path / "half", (Lora(write(tmp_path / "a.safetensors", tensors)),))
    file = tmp_path / "overlay.safetensors"
    write_overlay(checkpoint, "transformer", file, note=pytest.fail)
    (weight,) = load_file(file).values()
    assert weight.dtype == kept
    assert weight.equal((before + up @ down).to(kept))


def test_overlay_holds_the_changed_weights_alone(flux: Path, tmp_path: Path) -> None:
    layers = pairs(TINY["flux"]().transformer, MODULES["flux"])
    checkpoint = Checkpoint(
        flux, (Lora(write(tmp_path / "a.safetensors", diffusers_names(layers))),)
    )
    file = tmp_path / "overlay.safetensors"
    write_overlay(checkpoint, "transformer", file, note=pytest.fail)
    found, expected = load_file(file), dict(merge(checkpoint, "transformer"))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert all(tensor.offset % 4 == 0 for tensor in read_tensors(file).values())


def test_layers_that_were_never_trained_are_not_written(flux: Path, tmp_path: Path) -> None:
    tensors = one_layer() | one_layer("transformer_blocks.0.ff.net.2")
    tensors["transformer.context_embedder.lora_B.weight"].zero_()
    found = merged(flux, Lora(write(tmp_path / "a.safetensors", tensors)))
    assert found.keys() == {"transformer_blocks.0.ff.net.2.weight"}


def test_merged_weights_go_into_the_network_that_diffusers_loaded(
    flux: Path, tmp_path: Path
) -> None:
    network: Any = TINY["flux"]().transformer
    checkpoint = Checkpoint(flux, (Lora(write(tmp_path / "a.safetensors", one_layer())),))
    (expected,) = dict(merge(checkpoint, "transformer")).values()
    merge_into(network, checkpoint, "transformer")
    assert network.context_embedder.weight.equal(expected)


@pytest.mark.parametrize(
    "layer",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_layers_of_text_encoders_are_left_out_and_counted(
    flux: Path, tmp_path: Path, layer: str
) -> None:
    down, up = pair(40, 40)
    tensors = one_layer() | {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    checkpoint = Checkpoint(flux, (Lora(write(tmp_path / "a.safetensors", tensors)),))
    said: list[str] = []
    write_overlay(checkpoint, "transformer", tmp_path / "overlay.safetensors", said.append)
    assert load_file(tmp_path / "overlay.safetensors").keys() == {"context_embedder.weight"}
    (line,) = said
    assert f"1 layers of text encoders are left out, such as {layer}" in line


def test_a_file_and_its_scale_are_parsed(tmp_path: Path) -> None:
    plain, colon = tmp_path / "a.safetensors", tmp_path / "a.safetensors:2"
    plain.touch()
    assert Lora.parse(str(plain)) == Lora(plain, 1.0)
    assert Lora.parse(f"{plain}:0.8") == Lora(plain, 0.8)
    assert Lora.parse(f"{plain}:-1") == Lora(plain, -1.0)
    assert Lora.parse(f"{plain}:2") == Lora(plain, 2.0)
    colon.touch()
    assert Lora.parse(f"{plain}:2") == Lora(colon, 1.0)
    assert Lora.parse(f"{plain}:2:3") == Lora(colon, 3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.safetensors", "missing.safetensors is no such file"),
        ("missing.safetensors:1", "missing.safetensors is no such file"),
        ("here.safetensors:strong", "'strong' is no scale"),
        ("here.safetensors:", "'' is no scale"),
        ("here.safetensors:nan", "a finite number other than 0, found nan"),
        ("here.safetensors:inf", "a finite number other than 0, found inf"),
        ("here.safetensors:0", "a finite number other than 0, found 0"),
        ("folder", "folder is a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.safetensors").touch()
    Path("folder").mkdir()
    with pytest.raises(InputError, match=message):
        Lora.parse(text)


def test_identity_follows_content_scale_and_order_of_loras(flux: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one.safetensors", one_layer())
    other = write(tmp_path / "other.safetensors", one_layer("single_transformer_blocks.1.proj_mlp"))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(one.read_bytes())

    def digest(*loras: Lora) -> str:
        return identify(Checkpoint(flux, loras)).digest

    cases = [
        (),
        (Lora(one),),
        (Lora(one, 0.5),),
        (Lora(other),),
        (Lora(one), Lora(other)),
        (Lora(other), Lora(one)),
    ]
    assert len({digest(*loras) for loras in cases}) == len(cases)
    assert digest(Lora(copy)) == digest(Lora(one))
    assert identify(Checkpoint(flux, (Lora(one), Lora(other, 0.5)))).name == (
        "flux + one.safetensors + other.safetensors:0.5"
    )
