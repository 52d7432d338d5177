from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from numpy.typing import NDArray

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.errors import InputError
from meancache_trt.export import PromptEncoder, detect, export_components
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.qwen_image import QWEN_IMAGE
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from meancache_trt.session import Session
from tests.export.test_pipeline import Arrays, Graphs
from tests.export.tiny_qwen_image import FEATURES, tiny_pipeline

HEIGHT, WIDTH, TEXT_TOKENS = 32, 48, 160  # the tiny encoder's tokens are bytes of the template
STEPS, SCALE, SEED = 8, 4.0, 3
PROMPT, OTHER = "a red dog", "two cats on a mat, at night"
NEGATIVE = "blurry"

LATENT_TOLERANCE = 2e-5
"""Float32 sums in another order, over 8 evaluations of values near 1; measured 2e-6."""


@pytest.fixture(scope="module")
def diffusers_pipeline() -> QwenImagePipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(diffusers_pipeline: QwenImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen") / "tiny-qwen-image"
    diffusers_pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return create_bundle(
        folder.parent / "qwen.mcb",
        lambda target: export_components(
            folder, target, height=HEIGHT, width=WIDTH, text_tokens=TEXT_TOKENS
        ),
        {},
    )


@pytest.fixture(scope="module")
def graphs(bundle: Bundle) -> Graphs:
    return Graphs(bundle.directory, bundle.export)


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def full(pipeline: Pipeline) -> Schedule:
    return bake("euler", pipeline.grid(STEPS), range(STEPS), name="full")


def test_pipeline_is_detected(folder: Path) -> None:
    assert detect(folder) is QWEN_IMAGE


def random_feeds(lengths: Sequence[int], rows: int, columns: int, text_tokens: int) -> Arrays:
    """Inputs of `prepare` and the transformer for two prompts a sample, of these lengths."""
    generator = np.random.default_rng(rows)
    two_batch = len(lengths)
    feeds = {
        "noise": generator.standard_normal((two_batch // 2, 1, 4, 2 * rows, 2 * columns)),
        "hidden_states": generator.standard_normal((two_batch, rows * columns, 16)),
        "encoder_hidden_states": generator.standard_normal((two_batch, text_tokens, FEATURES)),
        "timestep": generator.uniform(0, 1, two_batch),
    }
    mask = np.arange(text_tokens) < np.asarray(lengths)[:, None]
    floats = {name: value.astype(np.float32) for name, value in feeds.items()}
    return {**floats, "encoder_hidden_states_mask": mask}


@pytest.mark.parametrize(
    ("rows", "columns", "lengths"), [(2, 5, [7, 3]), (9, 4, [1, 13, 8, 5]), (3, 3, [16, 2, 9, 9])]
)
def test_transformer_graph_is_the_unpatched_network_at_other_sizes_and_text_lengths(
    graphs: Graphs,
    diffusers_pipeline: QwenImagePipeline,
    rows: int,
    columns: int,
    lengths: list[int],
) -> None:
    feeds = random_feeds(lengths, rows, columns, max(lengths))
    feeds |= graphs.run("prepare", feeds)
    found = graphs.run("transformer", feeds)["velocity"]
    for index, length in enumerate(lengths):
        with torch.inference_mode():
            expected = diffusers_pipeline.transformer(
                hidden_states=torch.from_numpy(feeds["hidden_states"][index : index + 1]),
                # the prompt alone, without padding or mask
                encoder_hidden_states=torch.from_numpy(
                    feeds["encoder_hidden_states"][index : index + 1, :length]
                ),
                timestep=torch.from_numpy(feeds["timestep"][index : index + 1]),
                img_shapes=[[(1, rows, columns)]],
                return_dict=False,
            )[0]
        # float32 kernels unlike torch's; measured 8e-7
        np.testing.assert_allclose(found[index], expected[0].numpy(), rtol=0, atol=1e-5)


def test_padding_does_not_reach_the_velocity_and_everything_else_does(graphs: Graphs) -> None:
    feeds = random_feeds([7, 4], 4, 6, 12)
    feeds |= graphs.run("prepare", feeds)
    base = graphs.run("transformer", feeds)["velocity"]
    padded = {**feeds, "encoder_hidden_states": feeds["encoder_hidden_states"].copy()}
    padded["encoder_hidden_states"][:, 7:] *= -3
    assert np.array_equal(graphs.run("transformer", padded)["velocity"], base)
    for name in ("timestep", "encoder_hidden_states", "hidden_states", "image_rope", "text_rope"):
        moved = {**feeds, name: np.roll(feeds[name], 1, axis=-1)}
        found = graphs.run("transformer", moved)["velocity"]
        assert np.abs(found - base).max() > 1e-4, name


@pytest.mark.parametrize(("rows", "columns", "text_tokens"), [(4, 6, 12), (41, 24, 77), (1, 1, 1)])
def test_prepare_graph_has_the_pipelines_bits(
    graphs: Graphs,
    diffusers_pipeline: QwenImagePipeline,
    rows: int,
    columns: int,
    text_tokens: int,
) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    sizes = (4, 8 * rows, 8 * columns)
    latent = diffusers_pipeline.prepare_latents(2, *sizes, torch.float32, "cpu", generators)
    noise = [
        torch.randn(1, 4, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(seed))
        for seed in range(2)
    ]
    image, text = diffusers_pipeline.transformer.pos_embed(
        [[(1, rows, columns)]], max_txt_seq_len=text_tokens, device=torch.device("cpu")
    )

    feeds = random_feeds([1] * 4, rows, columns, text_tokens)
    made = graphs.run("prepare", {**feeds, "noise": torch.stack(noise).numpy()})

    assert np.array_equal(made["latent"], latent.numpy())
    assert np.array_equal(made["model_input"], torch.cat([latent, latent]).numpy())
    for name, table in (("image_rope", image), ("text_rope", text)):
        assert np.array_equal(made[name], torch.cat([table.real, table.imag], -1).numpy())


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 3)])
def test_decoder_graph_is_what_the_pipeline_does_after_its_loop(
    graphs: Graphs, diffusers_pipeline: QwenImagePipeline, rows: int, columns: int
) -> None:
    packed = torch.randn(2, rows * columns, 16, generator=torch.Generator().manual_seed(0))
    expected = decoded(diffusers_pipeline, packed, 8 * rows, 8 * columns)

    grid = packed.unflatten(1, (rows, columns)).numpy()
    image = graphs.run("vae_decoder", {"latent": grid})["image"]

    # other float32 convolution kernels than torch's; measured 4e-7
    picture = np.clip(np.moveaxis(image, 1, -1), 0, 1)
    np.testing.assert_allclose(picture, expected, rtol=0, atol=1e-5)
    assert image.std() > 0.05


def decoded(pipe: QwenImagePipeline, packed: torch.Tensor, height: int, width: int) -> Any:
    """What QwenImagePipeline.__call__ does after its loop; it offers no part that does it."""
    latents = pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor)
    shape = (1, pipe.vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(pipe.vae.config.latents_mean).view(shape)
    std = 1.0 / torch.tensor(pipe.vae.config.latents_std).view(shape)
    with torch.inference_mode():
        image = pipe.vae.decode(latents / std + mean, return_dict=False)[0][:, :, 0]
    return pipe.image_processor.postprocess(image, output_type="np")


def test_prompts_are_encoded_as_the_pipeline_does_and_padded(
    pipeline: Pipeline, diffusers_pipeline: QwenImagePipeline
) -> None:
    found = pipeline.encode([PROMPT, OTHER, ""]).tensors
    assert found["encoder_hidden_states_mask"].dtype == np.bool_
    for index, prompt in enumerate((PROMPT, OTHER, "")):
        with torch.inference_mode():
            features, mask = diffusers_pipeline.encode_prompt(prompt)
        count = features.shape[1]
        assert mask is None  # which is how the pipeline says that nothing is padded
        assert found["encoder_hidden_states_mask"][index].sum() == count
        assert np.array_equal(found["encoder_hidden_states"][index, :count], features[0].numpy())
        assert not found["encoder_hidden_states"][index, count:].any()


def diffusers_latent(pipe: QwenImagePipeline, **changes: Any) -> NDArray[np.float32]:
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "true_cfg_scale": SCALE,
        "num_inference_steps": STEPS,
        "generator": torch.Generator("cpu").manual_seed(SEED),
        **changes,
    }
    images = pipe(height=HEIGHT, width=WIDTH, output_type="latent", **arguments).images
    latent: NDArray[np.float32] = images[0].numpy()
    return latent


def our_latent(pipeline: Pipeline, schedule: Schedule, **changes: Any) -> NDArray[np.float32]:
    arguments = {"negative_prompt": NEGATIVE, "guidance_scale": SCALE, "seed": SEED, **changes}
    (found,) = pipeline.render([PROMPT], schedule=schedule, noise="torch", **arguments)
    return found.latent


def test_all_steps_equal_the_diffusers_pipeline(
    pipeline: Pipeline, diffusers_pipeline: QwenImagePipeline, full: Schedule
) -> None:
    expected = diffusers_latent(diffusers_pipeline)
    assert np.abs(our_latent(pipeline, full) - expected).max() <= LATENT_TOLERANCE


def test_a_schedule_equals_the_diffusers_pipeline_with_our_scheduler(
    pipeline: Pipeline, diffusers_pipeline: QwenImagePipeline, full: Schedule
) -> None:
    schedule = bake("official", pipeline.grid(STEPS), [0, 1, 3, 6], [1, 1, 2], name="b4")
    stock = diffusers_pipeline.scheduler
    diffusers_pipeline.scheduler = MeanCacheScheduler.from_schedule(schedule, stock)
    try:
        expected = diffusers_latent(diffusers_pipeline)
    finally:
        diffusers_pipeline.scheduler = stock
    found = our_latent(pipeline, schedule)
    assert np.abs(found - expected).max() <= LATENT_TOLERANCE
    assert np.abs(found - our_latent(pipeline, full)).max() > 100 * LATENT_TOLERANCE


def test_pixels_equal_diffusers_decoding(
    pipeline: Pipeline, diffusers_pipeline: QwenImagePipeline, full: Schedule
) -> None:
    (found,) = pipeline.render([PROMPT], schedule=full)
    packed = torch.from_numpy(found.latent)[None]
    expected = decoded(diffusers_pipeline, packed, HEIGHT, WIDTH)[0]
    assert np.abs(found.pixels - expected).max() <= 1e-4  # float32, another order of sums


def test_scale_and_negative_prompt_are_the_models_and_the_empty_one_by_default(
    pipeline: Pipeline, diffusers_pipeline: QwenImagePipeline, full: Schedule
) -> None:
    expected = diffusers_latent(diffusers_pipeline, negative_prompt="", true_cfg_scale=4.0)
    (found,) = pipeline.render([PROMPT], seed=SEED, schedule=full, noise="torch")
    assert np.abs(found.latent - expected).max() <= LATENT_TOLERANCE
    assert found.guidance_scale == 4.0
    assert np.abs(found.latent - our_latent(pipeline, full)).max() > 100 * LATENT_TOLERANCE


def test_scale_one_is_diffusers_without_guidance(
    pipeline: Pipeline, diffusers_pipeline: QwenImagePipeline, full: Schedule
) -> None:
    unguided = diffusers_latent(diffusers_pipeline, negative_prompt=None, true_cfg_scale=1.0)
    found = our_latent(pipeline, full, guidance_scale=1.0)
    assert np.abs(found - unguided).max() <= LATENT_TOLERANCE


def test_scales_below_one_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match=r"at least 1, .* found 0\.5"):
        pipeline.guidance(0.5)


def test_each_picture_has_its_own_prompt_seed_and_negative_prompt(
    pipeline: Pipeline, full: Schedule, tmp_path: Path
) -> None:
    negatives = [NEGATIVE, OTHER]
    both = pipeline.render([OTHER, PROMPT], negative_prompt=negatives, seed=[1, 2], schedule=full)
    (alone,) = pipeline.render([PROMPT], negative_prompt=OTHER, seed=2, schedule=full)
    assert np.array_equal(both[1].pixels, alone.pixels)
    assert [(made.prompt, made.negative_prompt) for made in both] == [
        (OTHER, NEGATIVE),
        (PROMPT, OTHER),
    ]
    alone.save(tmp_path / "a.png")
    assert b"negative_prompt" in (tmp_path / "a.png").read_bytes()


def test_a_number_of_negative_prompts_that_does_not_fit_is_refused(
    pipeline: Pipeline, full: Schedule
) -> None:
    with pytest.raises(InputError, match="3 prompts need 3 negative prompts or a single one"):
        pipeline.render([PROMPT] * 3, negative_prompt=[NEGATIVE] * 2, schedule=full)


def test_embeddings_with_their_mask_survive_the_file(
    pipeline: Pipeline, full: Schedule, tmp_path: Path
) -> None:
    pipeline.encode([PROMPT]).save(tmp_path / "prompt.safetensors")
    pipeline.encode([NEGATIVE]).save(tmp_path / "negative.safetensors")
    (found,) = pipeline.render(
        Conditioning.load(tmp_path / "prompt.safetensors"),
        negative_prompt=Conditioning.load(tmp_path / "negative.safetensors"),
        seed=SEED,
        schedule=full,
        noise="torch",
    )
    assert np.array_equal(found.latent, our_latent(pipeline, full))


def test_cached_prompts_need_no_encoder_the_empty_negative_one_included(
    bundle: Bundle, full: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline(bundle, embedding_cache=tmp_path) as first:
        (expected,) = first.render([PROMPT], schedule=full)
    monkeypatch.setattr(PromptEncoder, "encode", lambda *_: pytest.fail("must not encode"))
    with Pipeline(bundle, embedding_cache=tmp_path) as second:
        (found,) = second.render([PROMPT], schedule=full)
    assert np.array_equal(found.latent, expected.latent)


def test_embeddings_of_another_length_are_refused(pipeline: Pipeline, full: Schedule) -> None:
    made = pipeline.encode([NEGATIVE])
    shorter = Conditioning(
        made.prompts, {name: tensor[:, :100] for name, tensor in made.tensors.items()}
    )
    with pytest.raises(InputError, match=r"\(160, 48\) .* found \(100, 48\)"):
        pipeline.render([PROMPT], negative_prompt=shorter, schedule=full)


def test_batch_of_two_equals_two_singles(pipeline: Pipeline, full: Schedule) -> None:
    size = pipeline.resolution()
    noise = np.stack([philox_normal(seed, size.noise_shape) for seed in range(2)])
    prompts, negatives = pipeline.encode([PROMPT, OTHER]), pipeline.encode([NEGATIVE, ""])
    session = Session(pipeline.graphs, full, size, batch=2)
    both = session.run(noise, prompts.followed_by(negatives).tensors, SCALE)
    for index in range(2):
        fed = prompts.select(index).followed_by(negatives.select(index))
        single = pipeline.session(full).run(noise[index][None], fed.tensors, SCALE)
        # float32 matrix products may be blocked otherwise at another batch, over 8 evaluations
        np.testing.assert_allclose(both.latents[index], single.latents[0], rtol=0, atol=2e-5)


def test_calibration_records_the_guided_pipeline(
    folder: Path, diffusers_pipeline: QwenImagePipeline, tmp_path: Path
) -> None:
    options = RecordOptions(size=(HEIGHT, WIDTH), prompts=(PROMPT,), steps=STEPS, samples=1)
    (recorded,) = stages.record_pipeline(
        Checkpoint(folder), tmp_path, options, note=lambda _: None, report=lambda *_: None
    )
    generator = torch.Generator("cpu").manual_seed(0)
    expected = diffusers_latent(diffusers_pipeline, negative_prompt="", generator=generator)
    assert np.array_equal(recorded.final.reshape(expected.shape), expected)


def test_record_holds_what_a_host_needs(bundle: Bundle) -> None:
    export = bundle.export
    assert export.guidance.rule == "classifier_free_rescaled"
    assert export.guidance.is_classifier_free
    assert export.text_tokens == TEXT_TOKENS
    assert export.resolution.noise_shape == (1, 4, 8, 12)
    assert export.resolution.decode_shape == (4, 6, 16)
    assert {record.component for record in export.parity} == {
        "prepare",
        "transformer",
        "vae_decoder",
    }
    for name in ("transformer", "vae_decoder"):
        part = export.components[name]
        assert part.shared_bytes >= 0.95 * part.weight_bytes > 0
