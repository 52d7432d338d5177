from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import Flux2Pipeline

from meancache_trt.errors import ExportError, InputError, RuntimeUnavailableError
from meancache_trt.export import PromptEncoder, flux2_torch
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Size, check_size
from meancache_trt.export.flux2 import FLUX2
from meancache_trt.record import Recorder, RecordOptions
from tests.export.tiny_flux2 import CHANNELS, FEATURES, tiny_pipeline, tiny_transformer

# black-forest-labs/FLUX.2-dev: the defaults of both classes, without what is unused
DEV: dict[str, dict[str, Any]] = {
    "transformer": {
        "axes_dims_rope": [32, 32, 32, 32],
        "guidance_embeds": True,
        "in_channels": 128,
        "joint_attention_dim": 15360,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 32,
        "sample_size": 1024,
    },
}


def changed(component: str, **settings: Any) -> dict[str, dict[str, Any]]:
    return {**DEV, component: {**DEV[component], **settings}}


def test_published_configuration_has_the_models_sizes() -> None:
    assert (FLUX2.multiple(DEV), FLUX2.default_side(DEV), FLUX2.longest_side(DEV)) == (
        *(16, 1024),
        8192,
    )
    signatures = FLUX2.signatures(DEV)
    packed = ("batch", 128, "latent_rows", "latent_columns")
    assert signatures.prepare.inputs["noise"].shape == packed
    assert signatures.transformer.inputs["text_rope"].shape == ("text_tokens", 256)
    assert FLUX2.default_text_tokens(DEV) == 512
    assert FLUX2.mu == "empirical"


def test_guidance_is_embedded_where_the_configuration_says_so() -> None:
    assert FLUX2.guidance(DEV).default_scale == 4.0
    assert "guidance" in FLUX2.signatures(DEV).transformer.inputs
    without = changed("transformer", guidance_embeds=False)
    assert FLUX2.guidance(without).rule == "none"
    assert "guidance" not in FLUX2.signatures(without).transformer.inputs


def test_text_that_the_tables_have_no_places_for_is_refused() -> None:
    with pytest.raises(InputError, match="text_tokens is 513; expected at most 512"):
        check_size(FLUX2, DEV, Size(1024, 1024, 513))


def test_vae_of_another_model_is_refused_with_both_numbers() -> None:
    with pytest.raises(ExportError, match=r"16 latent channels.*should be 64.*says 128"):
        FLUX2.signatures(changed("vae", latent_channels=16))


def fail_within_the_transformer_graph(network: torch.nn.Module) -> None:
    with flux2_torch.transformer_graph(network):
        raise RuntimeError


def test_leaving_the_transformer_graph_restores_the_network() -> None:
    network = tiny_transformer()
    before = dict(network.named_modules())
    with pytest.raises(RuntimeError):
        fail_within_the_transformer_graph(network)
    assert dict(network.named_modules()) == before


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(512, 1, 3), (2, 512, 512), (9, 4, 1)])
def test_tables_are_the_pipelines_to_the_longest_side_bit_for_bit(
    rows: int, columns: int, tokens: int
) -> None:
    network = tiny_transformer()
    noise = torch.randn(2, CHANNELS, rows, columns)
    module = flux2_torch.prepare_graph(network, {"transformer": network.config})
    latent, image, text = module(noise, torch.zeros(1, tokens, FEATURES))
    packed, ids = Flux2Pipeline.prepare_latents(
        tiny_pipeline(), 2, CHANNELS // 4, 8 * rows, 8 * columns, noise.dtype, "cpu", None, noise
    )
    assert torch.equal(latent, packed)
    assert torch.equal(image, torch.cat(network.pos_embed(ids[0]), dim=-1))
    counted = torch.tensor([[0, 0, 0, token] for token in range(tokens)])
    assert torch.equal(text, torch.cat(network.pos_embed(counted), dim=-1))


def test_a_prompt_beyond_the_text_tokens_is_cut_as_the_pipeline_does() -> None:
    pipeline, prompts = tiny_pipeline(), ["two cats on a mat at night", "a"]
    with torch.inference_mode():
        features, _ = pipeline.encode_prompt(prompts, max_sequence_length=12)
        found = flux2_torch.encode_prompts(pipeline, prompts, 12)
    assert torch.equal(found["encoder_hidden_states"], features)
    assert features.shape == (2, 12, FEATURES)


def test_a_tokenizer_whose_library_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lacking(type):
        def __getattr__(cls, name: str) -> object:
            raise ImportError(
                "\nPixtralProcessor requires the Torchvision library but it was not found in your"
            )

    class PixtralProcessor(metaclass=Lacking):
        """As transformers has it without torchvision."""

    tiny_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]  # as FLUX.2-dev has it
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(transformers, "PixtralProcessor", PixtralProcessor)
    options = RecordOptions(size=(32, 32), prompts=("a",))
    for load in (
        lambda: PromptEncoder(FLUX2, tmp_path, 12).encode(["a"]),
        lambda: Recorder(Checkpoint(tmp_path), options).pipeline,
    ):
        with pytest.raises(RuntimeUnavailableError, match=r"^tokenizer of .* requires the Torchv"):
            load()
