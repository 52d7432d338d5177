"""Wan: the spec at published sizes, and the wrapper on tiny random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scripts.full_size.models import MODELS

from meancache_trt.errors import ExportError, InputError
from meancache_trt.export import detect, wan_torch
from meancache_trt.export.family import Configs, Size, check_size, default_frames, resolution
from meancache_trt.export.trace import build_network, cast_stored
from meancache_trt.export.wan import WAN
from meancache_trt.meancache.sigmas import SecondStage
from tests.export.tiny_wan import (
    tiny_5b,
    tiny_a14b,
    tiny_pipeline,
    tiny_transformer,
    tiny_vae,
    tiny_vae_5b,
)

PUBLISHED = MODELS["Wan2.2-T2V-A14B"]
A14B: Configs = {"transformer": PUBLISHED.transformer, "vae": PUBLISHED.vae}

# Wan-AI/Wan2.2-TI2V-5B-Diffusers, what differs
TI2V_5B: Configs = {
    "transformer": {**PUBLISHED.transformer, "in_channels": 48, "out_channels": 48},
    "vae": {
        **PUBLISHED.vae,
        "is_residual": True,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "z_dim": 48,
    },
}


def changed(component: str, **settings: Any) -> Configs:
    return {**A14B, component: {**A14B[component], **settings}}


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_a14b, tiny_5b])
def test_pipeline_is_detected(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    assert detect(tmp_path) is WAN


def test_published_sizes_give_the_pipelines_shapes() -> None:
    record = resolution(WAN, A14B, Size(480, 832, 512, 81))
    assert record.noise_shape == record.latent_shape == record.decode_shape == (16, 21, 60, 104)
    assert record.symbols["image_tokens"] == 21 * 30 * 52
    record = resolution(WAN, TI2V_5B, Size(704, 1280, 512, 121))
    assert record.latent_shape == (48, 31, 44, 80)
    assert record.symbols["image_tokens"] == 31 * 22 * 40


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Size(480, 840, 512, 81), "width is 840; .* multiple of 16 .* use 832 or 848"),
        (Size(480, 16400, 512, 81), "width is 16400; .* and 16384; use 16384"),
        (Size(480, 832, 512, 80), r"frames is 80; .* 1 \+ a multiple of 4 .* use 77 or 81"),
        (Size(480, 832, 512, 4097), "frames is 4097; .* at most 4093; use 4093"),
    ],
)
def test_impossible_sizes_are_told_with_the_nearest_valid_ones(size: Size, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_size(WAN, A14B, size)


def test_defaults_are_the_pipelines_and_the_cards() -> None:
    assert (WAN.default_side(A14B), default_frames(WAN, A14B)) == (640, 81)
    assert (WAN.default_side(TI2V_5B), default_frames(WAN, TI2V_5B)) == (960, 121)
    assert WAN.frames is not None
    assert (WAN.frames(A14B).per_second, WAN.frames(TI2V_5B).per_second) == (16.0, 24.0)
    assert WAN.default_text_tokens(A14B) == 512
    assert WAN.guidance(A14B).default_scale == 5.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 36, "image_dim": 1280}, "'in_channels': 36.*'image_dim': 1280"),
        ({"added_kv_proj_dim": 5120}, "'added_kv_proj_dim': 5120"),
        ({"in_channels": 36}, "'in_channels': 36, 'out_channels': 16"),
    ],
)
def test_a_transformer_that_is_not_for_text_to_video_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        WAN.signatures(changed("transformer", **settings))


@pytest.mark.parametrize("patch", [[2, 2, 2], [1, 2, 4]])
def test_a_token_of_several_frames_or_no_square_is_refused(patch: list[int]) -> None:
    with pytest.raises(ExportError, match="expected one latent frame and a square"):
        WAN.multiple(changed("transformer", patch_size=patch))


def staged(**changes: Any) -> Configs:
    index = {"boundary_ratio": 0.875}
    parts = {**A14B, "model_index": index, "scheduler": {}, "transformer_2": A14B["transformer"]}
    return {**parts, **changes}


def test_the_second_stage_begins_below_the_boundary() -> None:
    assert WAN.second_stage is not None
    assert WAN.second_stage(staged()) == SecondStage(boundary_timestep=875.0)
    shorter = staged(scheduler={"num_train_timesteps": 500})
    assert WAN.second_stage(shorter) == SecondStage(boundary_timestep=437.5)
    assert WAN.second_stage(staged(model_index={"boundary_ratio": None})) is None
    assert WAN.second_stage({**A14B, "model_index": {}}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer_2": {**A14B["transformer"], "num_layers": 30}}, "found other num_layers"),
        ({"transformer_2": {}}, "found no transformer_2"),
    ],
)
def test_a_second_stage_of_another_network_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    assert WAN.second_stage is not None
    with pytest.raises(ExportError, match=message):
        WAN.second_stage(staged(**changes))


def fail_within_the_transformer_graph(network: Any) -> None:
    with wan_torch.transformer_graph(network):
        raise RuntimeError


def test_leaving_the_transformer_graph_restores_the_network() -> None:
    network = tiny_transformer()
    processor = type(network.blocks[0].attn1.processor)
    before, call = dict(network.named_modules()), processor.__call__
    with wan_torch.transformer_graph(network):
        assert dict(network.named_modules()) != before
        assert processor.__call__ is not call
    with pytest.raises(RuntimeError):
        fail_within_the_transformer_graph(network)
    assert dict(network.named_modules()) == before
    assert processor.__call__ is call


@pytest.mark.parametrize("extents", [(1, 1, 1), (64, 1, 2), (1, 64, 1), (2, 1, 64), (21, 5, 9)])
def test_prepare_tables_are_the_models_own_bit_for_bit(extents: tuple[int, int, int]) -> None:
    network = tiny_transformer()
    module = wan_torch.prepare_graph(network, {"transformer": network.config})
    frames, rows, columns = extents
    noise = torch.randn(2, 4, frames, 2 * rows, 2 * columns)
    latent, model_input, *tables = module(noise)
    assert torch.equal(latent, noise)
    assert torch.equal(model_input, torch.cat([noise, noise]))
    for found, expected in zip(tables, network.rope(noise), strict=True):
        assert found.shape[:3] == extents
        assert torch.equal(found.flatten(0, 2), expected.flatten(0, 2))


# 1 latent frame, where nothing follows the first; 2 and 3, where diffusers' cache is not full yet
@pytest.mark.parametrize("frames", [1, 2, 3, 6])
@pytest.mark.parametrize("make", [tiny_vae, tiny_vae_5b])
def test_the_decoder_is_the_one_of_single_frames(make: Any, frames: int) -> None:
    vae = make()
    latent = torch.randn(2, 4, frames, 3, 5, generator=torch.Generator().manual_seed(frames))
    with torch.inference_mode():
        found = wan_torch.decoder_graph(vae)(latent)
        expected = wan_torch.reference_image(vae, latent, {})
    assert found.shape[2] == 4 * frames - 3
    # float32 convolutions over more frames at once; measured 1e-6
    torch.testing.assert_close(found.clamp(0, 1), expected, rtol=0, atol=5e-6)


def test_what_diffusers_keeps_in_float32_stays_so_in_a_bfloat16_network(tmp_path: Path) -> None:
    network = tiny_transformer()
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    built = cast_stored(build_network("WanTransformer3DModel", network.config), "bfloat16")
    found = {name: value.dtype for name, value in built.named_parameters()}
    assert found == {name: value.dtype for name, value in loaded.named_parameters()}
    assert set(found.values()) == {torch.bfloat16, torch.float32}
