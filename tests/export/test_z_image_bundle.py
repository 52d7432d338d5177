from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from numpy.typing import NDArray

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.errors import InputError
from meancache_trt.export import detect, export_components
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.z_image import LONGEST_TEXT_TOKENS, Z_IMAGE
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.presets import preset
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from meancache_trt.session import Session
from tests.export.test_pipeline import Arrays, Graphs
from tests.export.tiny_z_image import FEATURES, tiny_pipeline

# The tiny encoder's tokens are bytes: 29 and 46 of the prompts, in the template.
HEIGHT, WIDTH, TEXT_TOKENS = 32, 48, 96
STEPS, SCALE, SEED = 8, 4.0, 3
PROMPT, OTHER = "a red dog", "two cats on a mat, at night"
NEGATIVE = "blurry, and with many words, too"

LATENT_TOLERANCE = 2e-5
"""Float32 sums in another order, over 8 evaluations of values below 5; measured 5e-6."""


@dataclass(frozen=True)
class Made:
    """A diffusers pipeline, its folder, a bundle of it, and whether that is guided."""

    pipe: ZImagePipeline
    folder: Path
    bundle: Bundle
    is_guided: bool


def made(factory: pytest.TempPathFactory, *, shift: float, check_parity: bool) -> Made:
    pipe, folder = tiny_pipeline(shift=shift), factory.mktemp("z") / "tiny-z-image"
    pipe.save_pretrained(folder)
    bundle = create_bundle(
        folder.parent / "z.mcb",
        lambda target: export_components(
            folder,
            target,
            height=HEIGHT,
            width=WIDTH,
            text_tokens=TEXT_TOKENS,
            check_parity=check_parity,
        ),
        {},
    )
    return Made(pipe, folder, bundle, is_guided=bundle.export.guidance.is_classifier_free)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory, shift=6.0, check_parity=True)


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory, shift=3.0, check_parity=False)


@pytest.fixture(scope="module", params=["base", "turbo"])
def model(request: pytest.FixtureRequest) -> Made:
    found: Made = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def graphs(base: Made) -> Graphs:
    return Graphs(base.bundle.directory, base.bundle.export)


@pytest.fixture(scope="module")
def pipeline(base: Made) -> Iterator[Pipeline]:
    with Pipeline(base.bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def full(pipeline: Pipeline) -> Schedule:
    return bake("euler", pipeline.grid(STEPS), range(STEPS), name="full")


def test_pipeline_is_detected(base: Made, turbo: Made) -> None:
    assert detect(base.folder) is Z_IMAGE
    assert detect(turbo.folder) is Z_IMAGE


def random_feeds(lengths: Sequence[int], rows: int, columns: int, text_tokens: int) -> Arrays:
    """Inputs of `prepare` and the transformer for two prompts a sample, of these lengths."""
    generator = np.random.default_rng(rows)
    two_batch = len(lengths)
    feeds = {
        "noise": generator.standard_normal((two_batch // 2, 4, 2 * rows, 2 * columns)),
        "hidden_states": generator.standard_normal((two_batch, 4, 2 * rows, 2 * columns)),
        "encoder_hidden_states": generator.standard_normal((two_batch, text_tokens, FEATURES)),
        "timestep": generator.uniform(0, 1000, two_batch),
    }
    mask = np.arange(text_tokens) < np.asarray(lengths)[:, None]
    floats = {name: value.astype(np.float32) for name, value in feeds.items()}
    return {**floats, "encoder_hidden_states_mask": mask}


@pytest.mark.parametrize(
    ("rows", "columns", "lengths"),
    [(2, 5, [7, 33]), (9, 4, [1, 64, 65, 32]), (8, 12, [70, 2, 40, 40, 31, 96])],
)
def test_transformer_graph_is_the_unpatched_network_at_other_sizes_and_text_lengths(
    graphs: Graphs, base: Made, rows: int, columns: int, lengths: list[int]
) -> None:
    feeds = random_feeds(lengths, rows, columns, max(lengths))
    feeds |= graphs.run("prepare", feeds)
    found = graphs.run("transformer", feeds)["velocity"]
    for index, length in enumerate(lengths):
        with torch.inference_mode():
            ((output,),) = base.pipe.transformer(
                [torch.from_numpy(feeds["hidden_states"][index])[:, None]],
                (1000 - torch.from_numpy(feeds["timestep"][index : index + 1])) / 1000,
                [torch.from_numpy(feeds["encoder_hidden_states"][index, :length])],
                return_dict=False,
            )
        # float32 kernels unlike torch's; measured 2e-6
        np.testing.assert_allclose(found[index], -output[:, 0].numpy(), rtol=0, atol=1e-5)


def test_padding_does_not_reach_the_velocity_and_everything_else_does(graphs: Graphs) -> None:
    feeds = random_feeds([7, 40], 4, 6, 48)
    feeds |= graphs.run("prepare", feeds)
    velocity = graphs.run("transformer", feeds)["velocity"]
    padded = {**feeds, "encoder_hidden_states": feeds["encoder_hidden_states"].copy()}
    padded["encoder_hidden_states"][0, 7:] *= -3
    padded["encoder_hidden_states"][1, 40:] *= -3
    assert np.array_equal(graphs.run("transformer", padded)["velocity"], velocity)
    for name in ("timestep", "encoder_hidden_states", "hidden_states", "image_rope"):
        moved = {**feeds, name: np.roll(feeds[name], 1, axis=-1)}
        found = graphs.run("transformer", moved)["velocity"]
        assert np.abs(found - velocity).max() > 1e-4, name


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (41, 24), (4, 8)])
def test_prepare_graph_has_the_networks_bits(
    graphs: Graphs, base: Made, rows: int, columns: int
) -> None:
    lengths = [7, 33, 64, 96]
    feeds = random_feeds(lengths, rows, columns, 96)
    made = graphs.run("prepare", feeds)
    network = base.pipe.transformer
    pictures = [torch.zeros(4, 1, 2 * rows, 2 * columns)] * 4
    captions = [torch.zeros(length, FEATURES) for length in lengths]
    ids = network.patchify_and_embed(pictures, captions, 2, 1)[3]
    for index, positions in enumerate(ids):
        table = network.rope_embedder(positions)
        expected = torch.cat([table.real, table.imag], -1).numpy()
        assert np.array_equal(made["image_rope"][index], expected)
    assert np.array_equal(made["latent"], feeds["noise"])
    assert np.array_equal(made["model_input"], np.concatenate([feeds["noise"]] * 2))


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 3)])
def test_decoder_graph_is_what_the_pipeline_does_after_its_loop(
    graphs: Graphs, base: Made, rows: int, columns: int
) -> None:
    latent = torch.randn(2, 4, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(0))
    image = graphs.run("vae_decoder", {"latent": latent.numpy()})["image"]
    picture = np.clip(np.moveaxis(image, 1, -1), 0, 1)
    # other float32 convolution kernels than torch's; measured 1e-6
    np.testing.assert_allclose(picture, decoded(base.pipe, latent), rtol=0, atol=1e-5)
    assert image.std() > 0.05


def decoded(pipe: ZImagePipeline, latent: torch.Tensor) -> Any:
    """What ZImagePipeline.__call__ does after its loop; it offers no part that does it."""
    config = pipe.vae.config
    with torch.inference_mode():
        unscaled = latent / config.scaling_factor + config.shift_factor
        image = pipe.vae.decode(unscaled, return_dict=False)[0]
    return pipe.image_processor.postprocess(image, output_type="np")


def test_prompts_are_encoded_as_the_pipeline_does_and_padded(
    pipeline: Pipeline, base: Made
) -> None:
    prompts = [PROMPT, OTHER, ""]
    found = pipeline.encode(prompts).tensors
    assert found["encoder_hidden_states_mask"].dtype == np.bool_
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            (features,), _ = base.pipe.encode_prompt(prompt, max_sequence_length=TEXT_TOKENS)
        count = len(features)
        assert found["encoder_hidden_states_mask"][index].sum() == count
        assert np.array_equal(found["encoder_hidden_states"][index, :count], features.numpy())
        assert not found["encoder_hidden_states"][index, count:].any()


def diffusers_latent(model: Made, **changes: Any) -> NDArray[np.float32]:
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "guidance_scale": SCALE if model.is_guided else 0.0,
        "num_inference_steps": STEPS,
        "generator": torch.Generator("cpu").manual_seed(SEED),
        "max_sequence_length": TEXT_TOKENS,
        **changes,
    }
    images = model.pipe(height=HEIGHT, width=WIDTH, output_type="latent", **arguments).images
    latent: NDArray[np.float32] = images[0].numpy()
    return latent


def our_latent(
    pipeline: Pipeline, schedule: Schedule, prompt: str = PROMPT, **changes: Any
) -> NDArray[np.float32]:
    arguments: dict[str, Any] = {"seed": SEED}
    if pipeline.bundle.export.guidance.is_classifier_free:
        arguments |= {"negative_prompt": NEGATIVE, "guidance_scale": SCALE}
    arguments |= changes
    (found,) = pipeline.render([prompt], schedule=schedule, noise="torch", **arguments)
    return found.latent


def test_all_steps_and_a_schedule_equal_the_diffusers_pipeline(model: Made) -> None:
    with Pipeline(model.bundle) as pipeline:
        full = bake("euler", pipeline.grid(STEPS), range(STEPS))
        some = bake("official", pipeline.grid(STEPS), [0, 1, 3, 6], [1, 1, 2], name="b4")
        every, found = our_latent(pipeline, full), our_latent(pipeline, some)
    assert np.abs(every - diffusers_latent(model)).max() <= LATENT_TOLERANCE
    assert np.abs(found - skipping(model, some)).max() <= LATENT_TOLERANCE
    assert np.abs(found - every).max() > 100 * LATENT_TOLERANCE


def skipping(model: Made, schedule: Schedule, **changes: Any) -> NDArray[np.float32]:
    """The diffusers pipeline's latent with a schedule as its scheduler."""
    stock = model.pipe.scheduler
    model.pipe.scheduler = MeanCacheScheduler.from_schedule(schedule, stock)
    try:
        return diffusers_latent(model, **changes)
    finally:
        model.pipe.scheduler = stock


def test_a_published_schedule_applies_to_the_bundle_and_to_the_pipeline(
    pipeline: Pipeline, base: Made
) -> None:
    schedule = preset("Tongyi-MAI/Z-Image:13", height=HEIGHT, width=WIDTH)
    found = our_latent(pipeline, schedule)
    expected = skipping(base, schedule, num_inference_steps=50)
    assert np.abs(found - expected).max() <= LATENT_TOLERANCE


def test_pixels_equal_diffusers_decoding(pipeline: Pipeline, base: Made, full: Schedule) -> None:
    (found,) = pipeline.render([PROMPT], schedule=full)
    expected = decoded(base.pipe, torch.from_numpy(found.latent)[None])[0]
    assert np.abs(found.pixels - expected).max() <= 1e-4  # float32, another order of sums


def test_scale_and_negative_prompt_are_the_models_and_the_empty_one_by_default(
    pipeline: Pipeline, base: Made, full: Schedule
) -> None:
    expected = diffusers_latent(base, negative_prompt=None, guidance_scale=5.0)
    (found,) = pipeline.render([PROMPT], seed=SEED, schedule=full, noise="torch")
    assert np.abs(found.latent - expected).max() <= LATENT_TOLERANCE
    assert found.guidance_scale == 5.0


def test_scale_zero_is_diffusers_without_guidance(
    pipeline: Pipeline, base: Made, full: Schedule
) -> None:
    unguided = diffusers_latent(base, guidance_scale=0.0)
    found = our_latent(pipeline, full, guidance_scale=0.0)
    assert np.abs(found - unguided).max() <= LATENT_TOLERANCE


def test_scales_below_zero_are_refused_and_any_for_turbo(pipeline: Pipeline, turbo: Made) -> None:
    with pytest.raises(InputError, match=r"0 to 1000, found -0\.5"):
        pipeline.guidance(-0.5)
    with Pipeline(turbo.bundle) as opened, pytest.raises(InputError, match="no guidance scale"):
        opened.guidance(5.0)


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
        np.testing.assert_allclose(
            both.latents[index], single.latents[0], rtol=0, atol=LATENT_TOLERANCE
        )


def test_a_longer_text_bucket_renders_the_same_picture(
    pipeline: Pipeline, base: Made, full: Schedule
) -> None:
    assert base.bundle.export.text_buckets == (16, 24, 48, 96)
    expected = diffusers_latent(base, prompt=OTHER + OTHER, negative_prompt="")
    found = our_latent(pipeline, full, OTHER + OTHER, negative_prompt="")
    assert np.abs(found - expected).max() <= LATENT_TOLERANCE


def test_calibration_records_the_pipeline_as_a_render_runs_it(model: Made, tmp_path: Path) -> None:
    options = RecordOptions(
        size=(HEIGHT, WIDTH), prompts=(PROMPT,), steps=STEPS, samples=1, text_tokens=TEXT_TOKENS
    )
    (recorded,) = stages.record_pipeline(
        Checkpoint(model.folder), tmp_path, options, note=lambda _: None, report=lambda *_: None
    )
    generator = torch.Generator("cpu").manual_seed(0)
    scale = 5.0 if model.is_guided else 0.0
    expected = diffusers_latent(
        model, negative_prompt="", generator=generator, guidance_scale=scale
    )
    assert np.array_equal(recorded.final.reshape(expected.shape), expected)


def test_record_holds_what_a_host_needs(base: Made, turbo: Made) -> None:
    export = base.bundle.export
    assert export.guidance.rule == "classifier_free_from_conditional"
    assert turbo.bundle.export.guidance.rule == "none"
    assert export.resolution.noise_shape == (4, 8, 12)
    assert export.resolution.decode_shape == (4, 8, 12)
    assert {record.component for record in export.parity} == {
        "prepare",
        "transformer",
        "vae_decoder",
    }
    assert export.components["vae_decoder"].shared_bytes > 0
    part, table_bytes = export.components["transformer"], 4 * LONGEST_TEXT_TOKENS * 32
    assert 0 < part.weight_bytes - part.shared_bytes < 1.02 * table_bytes
