from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageCausalConv3d,
    QwenImageUpsample,
)
from diffusers.models.transformers import transformer_qwenimage

from meancache_trt.errors import ExportError, InputError
from meancache_trt.export import qwen_image_torch
from meancache_trt.export.family import Size, check_size
from meancache_trt.export.qwen_image import AXIS_POSITIONS, PIPELINE_MAX_TEXT_TOKENS, QWEN_IMAGE
from meancache_trt.export.rotation import real
from tests.export.tiny_qwen_image import FEATURES, tiny_pipeline, tiny_transformer, tiny_vae

# Qwen/Qwen-Image, transformer/config.json and vae/config.json, without what is unused
PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer": {
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": 24,
        "num_layers": 60,
        "out_channels": 16,
        "patch_size": 2,
    },
    "vae": {"temperal_downsample": [False, True, True], "z_dim": 16},
}


def test_published_configuration_has_the_models_sizes() -> None:
    assert QWEN_IMAGE.multiple(PUBLISHED) == 16
    assert QWEN_IMAGE.default_side(PUBLISHED) == 1328
    check_size(QWEN_IMAGE, PUBLISHED, Size(1328, 1328, 512))
    assert QWEN_IMAGE.symbols(PUBLISHED, Size(1328, 928, 512))["image_tokens"] == 83 * 58
    signatures = QWEN_IMAGE.signatures(PUBLISHED)
    assert signatures.transformer.inputs["image_rope"].shape == ("image_tokens", 128)
    assert signatures.prepare.inputs["noise"].shape[1:3] == (1, 16)
    assert QWEN_IMAGE.guidance(PUBLISHED).default_scale == 4.0


# 131072: Qwen/Qwen-Image, tokenizer/tokenizer_config.json
@pytest.mark.parametrize(("limit", "expected"), [(131072, 512), (66, 32), (10**30, 512)])
def test_default_text_length_is_the_tokenizers_after_the_template_within_the_pipelines(
    limit: int, expected: int
) -> None:
    configs = {**PUBLISHED, "tokenizer": {"model_max_length": limit}}
    assert QWEN_IMAGE.default_text_tokens(configs) == expected


def test_text_longer_than_the_pipeline_takes_is_refused() -> None:
    with pytest.raises(InputError, match="text_tokens is 1025; expected at most 1024"):
        check_size(QWEN_IMAGE, PUBLISHED, Size(1328, 1328, 1025))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 32}, "should be 64, but its config.json says 32"),
        ({"zero_cond_t": True}, "sets zero_cond_t"),
        ({"guidance_embeds": True}, "sets guidance_embeds"),
    ],
)
def test_checkpoint_of_another_pipeline_is_refused(settings: dict[str, Any], message: str) -> None:
    configs = {**PUBLISHED, "transformer": {**PUBLISHED["transformer"], **settings}}
    with pytest.raises(ExportError, match=message):
        QWEN_IMAGE.signatures(configs)


def patched_parts(network: QwenImageTransformer2DModel) -> tuple[Any, ...]:
    module = transformer_qwenimage
    functions = (module.apply_rotary_emb_qwen, module.compute_text_seq_len_from_mask)
    return (*functions, dict(network.named_modules()))


def fail_within_the_transformer_graph(network: QwenImageTransformer2DModel) -> None:
    with qwen_image_torch.transformer_graph(network):
        assert patched_parts(network)[0] is qwen_image_torch._rotate
        raise RuntimeError


def test_leaving_the_transformer_graph_restores_network_and_library() -> None:
    network = tiny_transformer()
    before = patched_parts(network)
    with pytest.raises(RuntimeError):
        fail_within_the_transformer_graph(network)
    assert patched_parts(network) == before


def test_decoding_one_frame_is_the_librarys_decoding_and_restores_it() -> None:
    vae, latent = tiny_vae(), torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    symbols = {"height": 24, "width": 40, "latent_height": 6}
    before = (QwenImageCausalConv3d.forward, QwenImageUpsample.forward)
    with torch.inference_mode():
        found = qwen_image_torch.decoder_graph(vae)(latent)
        assert (QwenImageCausalConv3d.forward, QwenImageUpsample.forward) == before
        expected = qwen_image_torch.reference_image(vae, latent, symbols)
    # two-dimensional kernels, which add in another order
    torch.testing.assert_close(found.clamp(0, 1), expected, rtol=0, atol=1e-5)


def test_real_rotation_is_the_complex_one() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 5, 3, 32, generator=generator)
    table = torch.polar(torch.ones(5, 16), torch.randn(5, 16, generator=generator))
    expected = transformer_qwenimage.apply_rotary_emb_qwen(value, table, use_real=False)
    found = qwen_image_torch._rotate(value, real(table), use_real=False)
    # two products and a sum of magnitude below 5, which a fused multiply-add rounds once less
    torch.testing.assert_close(found, expected, rtol=0, atol=5 * 2**-23)


@pytest.mark.parametrize(
    ("rows", "columns"), [(AXIS_POSITIONS, 1), (1, AXIS_POSITIONS), (83, 58), (2, 511)]
)
def test_prepare_tables_reach_the_longest_side_and_text_bit_for_bit(
    rows: int, columns: int
) -> None:
    network, tokens = tiny_transformer(), PIPELINE_MAX_TEXT_TOKENS
    module = qwen_image_torch.prepare_graph(network, {"transformer": network.config})
    noise = torch.zeros(1, 1, 4, 2 * rows, 2 * columns)
    symbols = {"latent_rows": rows, "latent_columns": columns, "text_tokens": tokens}
    expected = qwen_image_torch.reference_preparation(network, {"noise": noise}, symbols)
    found = module(noise, torch.zeros(2, tokens, FEATURES))
    for name, value in zip(
        ("latent", "model_input", "image_rope", "text_rope"), found, strict=True
    ):
        assert torch.equal(value, expected[name])


def test_a_prompt_beyond_the_text_tokens_is_cut_as_the_pipeline_does() -> None:
    pipeline, prompt = tiny_pipeline(), "two cats on a mat"
    with torch.inference_mode():
        features, _ = pipeline.encode_prompt(prompt, max_sequence_length=20)
        found = qwen_image_torch.encode_prompts(pipeline, [prompt], 20)
    assert torch.equal(found["encoder_hidden_states"], features)
    assert found["encoder_hidden_states_mask"].all()
