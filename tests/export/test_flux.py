from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from meancache_trt.errors import ExportError
from meancache_trt.export import flux_torch
from meancache_trt.export.flux import FLUX, rope_axes
from meancache_trt.export.packing import pack, unpack
from tests.export.tiny_flux import tiny_transformer

# black-forest-labs/FLUX.1-dev, transformer/config.json and vae/config.json, without what is unused
DEV: dict[str, dict[str, Any]] = {
    "transformer": {
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    },
    "vae": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16},
    "tokenizer_2": {"model_max_length": 512},
}
SCHNELL = {**DEV, "transformer": {**DEV["transformer"], "guidance_embeds": False}}


def changed(component: str, **settings: Any) -> dict[str, dict[str, Any]]:
    return {**DEV, component: {**DEV[component], **settings}}


def test_dev_takes_a_guidance_scale_and_schnell_does_not() -> None:
    assert FLUX.guidance(DEV).rule == "embedded"
    assert FLUX.guidance(DEV).default_scale == 3.5
    assert "guidance" in FLUX.signatures(DEV).transformer.inputs
    assert FLUX.guidance(SCHNELL).rule == "none"
    assert FLUX.guidance(SCHNELL).default_scale is None
    assert "guidance" not in FLUX.signatures(SCHNELL).transformer.inputs


def test_rope_width_is_that_of_the_heads_where_the_configuration_omits_it() -> None:
    assert sum(rope_axes(DEV)) == 128
    table = FLUX.signatures(DEV).transformer.inputs["image_rope"]
    assert table.shape == ("image_tokens", 256)


def test_sizes_are_multiples_of_sixteen() -> None:
    assert FLUX.multiple(DEV) == 16
    assert FLUX.longest_side(DEV) == 8192


@pytest.mark.parametrize(("limit", "expected"), [(512, 512), (77, 77), (10**30, 512)])
def test_default_text_length_is_the_tokenizers_within_the_pipelines(
    limit: int, expected: int
) -> None:
    assert FLUX.default_text_tokens(changed("tokenizer_2", model_max_length=limit)) == expected


def test_vae_of_another_model_is_refused_with_both_numbers() -> None:
    with pytest.raises(ExportError, match=r"4 latent channels.*should be 16.*says 64"):
        FLUX.signatures(changed("vae", latent_channels=4))


def test_configuration_without_a_setting_is_told() -> None:
    incomplete = {**DEV, "vae": {"latent_channels": 16}}
    with pytest.raises(ExportError, match=r"vae/config.json lacks 'block_out_channels'"):
        FLUX.multiple(incomplete)


def test_leaving_the_transformer_graph_restores_the_network() -> None:
    network = tiny_transformer()
    before = dict(network.named_modules())
    with flux_torch.transformer_graph(network):
        assert dict(network.named_modules()) != before
    assert dict(network.named_modules()) == before


def fail_within_the_transformer_graph(network: FluxTransformer2DModel) -> None:
    with flux_torch.transformer_graph(network):
        raise RuntimeError


def test_an_error_within_the_transformer_graph_restores_the_network_too() -> None:
    network = tiny_transformer()
    before = dict(network.named_modules())
    with pytest.raises(RuntimeError):
        fail_within_the_transformer_graph(network)
    assert dict(network.named_modules()) == before


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (8, 8)])
def test_packing_and_unpacking_are_the_pipelines(rows: int, columns: int) -> None:
    noise = torch.randn(2, 4, 2 * rows, 2 * columns)
    packed = pack(noise)
    assert torch.equal(packed, FluxPipeline._pack_latents(noise, *noise.shape))
    assert torch.equal(unpack(packed.unflatten(1, (rows, columns))), noise)


def test_prepare_tables_reach_the_longest_side_bit_for_bit() -> None:
    network = tiny_transformer()
    module = flux_torch.prepare_graph(network, {"transformer": network.config})
    text = torch.zeros(1, 7, 48)
    for rows, columns in ((512, 1), (2, 512), (64, 64)):
        noise = torch.zeros(1, 4, 2 * rows, 2 * columns)
        symbols = {"latent_rows": rows, "latent_columns": columns, "text_tokens": 7}
        expected = flux_torch.reference_preparation(network, {"noise": noise}, symbols)
        _, image_rope, text_rope = module(noise, text)
        assert torch.equal(image_rope, expected["image_rope"])
        assert torch.equal(text_rope, expected["text_rope"])
