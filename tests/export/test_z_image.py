from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from numpy.typing import NDArray

from meancache_trt.errors import ExportError, InputError
from meancache_trt.export import z_image_torch
from meancache_trt.export.family import Size, check_size
from meancache_trt.export.z_image import LONGEST_TEXT_TOKENS, Z_IMAGE
from meancache_trt.manifest import check_guidance
from meancache_trt.tiling import decode_tiled, levels
from tests.export.tiny_flux import tiny_vae
from tests.export.tiny_z_image import FEATURES, tiny_pipeline, tiny_transformer

# Tongyi-MAI/Z-Image: transformer, vae and scheduler configuration, without what is unused
PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer": {
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": 2560,
        "dim": 3840,
        "in_channels": 16,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "sample_size": 1024,
    },
    "scheduler": {"shift": 6.0, "use_dynamic_shifting": False},
    "tokenizer": {"model_max_length": 131072},
}
TURBO = {**PUBLISHED, "scheduler": {"shift": 3.0, "use_dynamic_shifting": False}}


def test_published_configuration_has_the_models_sizes() -> None:
    assert Z_IMAGE.multiple(PUBLISHED) == 16
    assert Z_IMAGE.default_side(PUBLISHED) == 1024
    assert Z_IMAGE.longest_side(PUBLISHED) == 8192
    assert Z_IMAGE.default_text_tokens(PUBLISHED) == 512
    symbols = Z_IMAGE.symbols(PUBLISHED, Size(720, 1296, 512))
    assert (symbols["image_tokens"], symbols["padded_image_tokens"]) == (45 * 81, 45 * 81 + 3)
    signatures = Z_IMAGE.signatures(PUBLISHED)
    rope = signatures.transformer.inputs["image_rope"]
    assert rope.shape == ("two_batch", "padded_image_tokens", 128)
    tiling = Z_IMAGE.tiling(PUBLISHED) if Z_IMAGE.tiling else None
    assert tiling
    assert tiling.space[0].tile == 128


def test_turbo_takes_one_prompt_and_no_scale_and_the_base_model_both() -> None:
    base, turbo = Z_IMAGE.guidance(PUBLISHED), Z_IMAGE.guidance(TURBO)
    assert (base.rule, base.default_scale) == ("classifier_free_from_conditional", 5.0)
    assert (turbo.rule, turbo.default_scale) == ("none", None)
    assert "model_input" not in Z_IMAGE.signatures(TURBO).prepare.outputs
    check_guidance(base, 0.0)
    with pytest.raises(InputError, match="takes no guidance scale"):
        check_guidance(turbo, 5.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 4}, "VAE's 16 latent channels .* says in_channels 4"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim 1152"),
        ({"axes_lens": [512, 512, 512]}, "gives 512 positions to text, expected at least 994"),
        ({"all_patch_size": [4]}, r"all_f_patch_size \(\[4\], \[1\]\)"),
    ],
)
def test_checkpoint_of_another_pipeline_is_refused(settings: dict[str, Any], message: str) -> None:
    configs = {**PUBLISHED, "transformer": {**PUBLISHED["transformer"], **settings}}
    with pytest.raises(ExportError, match=message):
        Z_IMAGE.signatures(configs)


def test_text_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(InputError, match="text_tokens is 993; expected at most 992"):
        check_size(Z_IMAGE, PUBLISHED, Size(1024, 1024, LONGEST_TEXT_TOKENS + 1))


def test_leaving_the_transformer_graph_restores_the_library() -> None:
    before = ZSingleStreamAttnProcessor.__call__
    with z_image_torch.transformer_graph(tiny_transformer()):
        assert ZSingleStreamAttnProcessor.__call__ is z_image_torch._attend
    assert ZSingleStreamAttnProcessor.__call__ is before


@pytest.mark.parametrize("text_tokens", [5, 64, LONGEST_TEXT_TOKENS])
@pytest.mark.parametrize(("rows", "columns"), [(4, 8), (3, 5)])
def test_patched_network_is_the_librarys_up_to_the_longest_text(
    rows: int, columns: int, text_tokens: int
) -> None:
    network, generator = tiny_transformer(), torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 2 * rows, 2 * columns, generator=generator)
    mask = torch.ones(1, text_tokens, dtype=torch.bool)
    feeds = {
        "hidden_states": noise,
        "encoder_hidden_states": torch.randn(1, text_tokens, FEATURES, generator=generator),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([310.0]),
    }
    _, rope = z_image_torch.prepare_graph(network, TURBO)(noise, mask)
    with torch.inference_mode():
        expected = z_image_torch.reference_velocity(network, feeds, {})
        with z_image_torch.transformer_graph(network) as module:
            found = module(**feeds, image_rope=rope)
    # the same float32 operations but for the rotation, whose products may be fused
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(512, 1), (1, 512), (45, 29)])
def test_prepare_tables_reach_the_longest_side_and_text_bit_for_bit(
    rows: int, columns: int
) -> None:
    network = tiny_transformer()
    noise = torch.zeros(1, 4, 2 * rows, 2 * columns)
    mask = torch.arange(LONGEST_TEXT_TOKENS) < torch.tensor([[LONGEST_TEXT_TOKENS], [33]])
    given = {"noise": noise, "encoder_hidden_states_mask": mask}
    expected = z_image_torch.reference_preparation(network, given, {})
    found = z_image_torch.prepare_graph(network, PUBLISHED)(noise, mask)
    for name, value in zip(("latent", "model_input", "image_rope"), found, strict=True):
        assert torch.equal(value, expected[name])


def test_a_prompt_beyond_the_text_tokens_is_cut_as_the_pipeline_does() -> None:
    pipeline, prompt = tiny_pipeline(), "two cats on a mat"
    with torch.inference_mode():
        (features,), _ = pipeline.encode_prompt(prompt, max_sequence_length=20)
        found = z_image_torch.encode_prompts(pipeline, [prompt], 20)
    assert torch.equal(found["encoder_hidden_states"][0], features)
    assert found["encoder_hidden_states_mask"].all()


@pytest.mark.parametrize(("height", "width"), [(14, 10), (8, 12), (4, 26)])
def test_pictures_are_what_diffusers_decodes_in_tiles(height: int, width: int) -> None:
    vae = tiny_vae()
    assert Z_IMAGE.tiling is not None
    tiling = Z_IMAGE.tiling({"vae": vae.config})
    latent = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(height))
    graph = z_image_torch.decoder_graph(vae)

    def decode(tile: NDArray[Any]) -> NDArray[Any]:
        made: NDArray[Any] = graph(torch.from_numpy(tile)).numpy().copy()
        return made

    with torch.inference_mode():
        found = decode_tiled(latent.numpy(), levels(tiling, is_space_tiled=True), decode)
        vae.enable_tiling()
        expected = z_image_torch.reference_image(vae, latent, {}).numpy()
    # blended in NumPy and in torch, which round products and sums apart
    np.testing.assert_allclose(found.clip(0, 1), expected, rtol=0, atol=1e-6)
