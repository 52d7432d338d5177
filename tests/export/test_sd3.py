from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meancache_trt.errors import ExportError, InputError
from meancache_trt.export import sd3_torch
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Configs, Size, check_size
from meancache_trt.export.job import Job
from meancache_trt.export.networks import transformers
from meancache_trt.export.sd3 import SD3
from tests.export.tiny_sd3 import tiny_pipeline, tiny_transformer

# stabilityai/stable-diffusion-3.5-medium and -large, without what is unused
MEDIUM: dict[str, dict[str, Any]] = {
    "transformer": {
        "attention_head_dim": 64,
        "dual_attention_layers": list(range(13)),
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 24,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "sample_size": 128,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "sample_size": 1024,
    },
    "tokenizer": {"model_max_length": 77},
}
LARGE = {
    **MEDIUM,
    "transformer": {**MEDIUM["transformer"], "pos_embed_max_size": 192, "num_layers": 38},
}


def test_published_configuration_has_the_models_sizes() -> None:
    assert SD3.multiple(MEDIUM) == 16
    assert SD3.default_side(MEDIUM) == 1024
    assert (SD3.longest_side(MEDIUM), SD3.longest_side(LARGE)) == (6144, 3072)
    signatures = SD3.signatures(MEDIUM)
    latent = (16, "latent_height", "latent_width")
    assert signatures.prepare.outputs["latent"].shape == ("batch", *latent)
    assert signatures.transformer.outputs["velocity"].shape == ("two_batch", *latent)
    assert signatures.transformer.inputs["pooled_projections"].shape == ("two_batch", 2048)
    assert SD3.guidance(MEDIUM).default_scale == 7.0


@pytest.mark.parametrize(("text_tokens", "prompt_tokens"), [(256, 333), (512, 589)])
def test_the_network_sees_the_tokens_of_clip_before_those_of_t5(
    text_tokens: int, prompt_tokens: int
) -> None:
    symbols = SD3.symbols(MEDIUM, Size(1024, 768, text_tokens))
    assert symbols["prompt_tokens"] == prompt_tokens
    assert (symbols["latent_height"], symbols["latent_width"]) == (128, 96)
    assert symbols["image_tokens"] == 64 * 48


@pytest.mark.parametrize(
    ("configs", "size", "message"),
    [
        (MEDIUM, Size(1024, 1024, 513), "text_tokens is 513; expected at most 512"),
        (LARGE, Size(1024, 3088, 256), "width is 3088; .* pixels between 16 and 3072; use 3072$"),
        (MEDIUM, Size(1000, 1024, 256), "height is 1000; .* use 992 or 1008"),
    ],
)
def test_a_size_that_the_network_has_no_positions_for_is_refused(
    configs: Configs, size: Size, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_size(SD3, configs, size)


@pytest.mark.parametrize("key", ["in_channels", "out_channels"])
def test_a_transformer_of_other_channels_is_refused(key: str) -> None:
    configs = {**MEDIUM, "transformer": {**MEDIUM["transformer"], key: 33}}
    with pytest.raises(ExportError, match=rf"16 latent channels.*'{key}': 33"):
        SD3.signatures(configs)


def fail_within_the_transformer_graph(network: torch.nn.Module) -> None:
    with sd3_torch.transformer_graph(network):
        assert torch.einsum is sd3_torch._transposed
        raise RuntimeError


def test_leaving_the_transformer_graph_restores_network_and_library() -> None:
    network = tiny_transformer()
    before = (torch.einsum, dict(network.named_modules()))
    with pytest.raises(RuntimeError):
        fail_within_the_transformer_graph(network)
    assert (torch.einsum, dict(network.named_modules())) == before


def test_a_transposition_is_what_einsum_makes_of_it() -> None:
    value = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    for equation in ("abcd->abcd", "abcd->dcab"):
        assert torch.equal(sd3_torch._transposed(equation, value), torch.einsum(equation, value))


def test_a_prompt_beyond_the_text_tokens_is_cut_as_the_pipeline_does() -> None:
    pipeline, prompts = tiny_pipeline(), ["two cats on a mat at night", "a"]
    with torch.inference_mode():
        features, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, max_sequence_length=6, do_classifier_free_guidance=False
        )
        found = sd3_torch.encode_prompts(pipeline, prompts, 6)
    assert features.shape[1] == 16 + 6
    assert torch.equal(found["encoder_hidden_states"], features)
    assert torch.equal(found["pooled_projections"], pooled)


@pytest.mark.parametrize(
    ("dual_attention", "expected"), [((0,), (0, 1, 2)), ((), (0, 2)), ((0, 1), (0, 2))]
)
def test_a_sample_has_the_first_block_of_each_kind(
    dual_attention: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path
) -> None:
    tiny_pipeline(dual_attention=dual_attention).save_pretrained(tmp_path / "tiny")
    source = Checkpoint(tmp_path / "tiny")
    configs = source.configs(("transformer", "vae", "scheduler", *SD3.text_components))
    job = Job(source, SD3, configs, Size(32, 48, 12), tmp_path, "link", lambda _: None)
    (model,) = transformers(job)
    network, blocks = model.sample()
    assert blocks == tuple(f"transformer_blocks.{number}" for number in expected)
    dropped = [f"transformer_blocks.{number}." for number in {0, 1, 2} - set(expected)]
    names = set(model.empty("float32").state_dict())
    assert set(network.state_dict()) == {n for n in names if not n.startswith(tuple(dropped))}
