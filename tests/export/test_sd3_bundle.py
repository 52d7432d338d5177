from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.errors import InputError
from meancache_trt.export import PromptEncoder, detect, export_components
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.sd3 import SD3
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from meancache_trt.session import Session
from tests.export.test_pipeline import Arrays, Graphs
from tests.export.tiny_sd3 import CHANNELS, CLIP_TOKENS, FEATURES, POOLED, TABLE_SIDE, tiny_pipeline

HEIGHT, WIDTH, TEXT_TOKENS = 32, 48, 12
STEPS, SCALE, SEED = 8, 4.0, 3
PROMPT, OTHER, NEGATIVE = "a red dog", "two cats on a mat", "blurry"

LATENT_TOLERANCE = 2e-5
"""Float32 sums in another order, over 8 evaluations of values near 1; measured 3e-6."""


@pytest.fixture(scope="module")
def diffusers_pipeline() -> StableDiffusion3Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(
    diffusers_pipeline: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("sd3") / "tiny-sd3"
    diffusers_pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return create_bundle(
        folder.parent / "sd3.mcb",
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
    with Pipeline(bundle, embedding_cache="off") as opened:
        yield opened


@pytest.fixture(scope="module")
def full(pipeline: Pipeline) -> Schedule:
    return bake("euler", pipeline.grid(STEPS), range(STEPS), name="full")


def test_pipeline_is_detected(folder: Path) -> None:
    assert detect(folder) is SD3


def test_default_size_is_the_transformers(folder: Path) -> None:
    assert stages.picture_size(Checkpoint(folder), None, 40) == (32, 40)


def random_feeds(batch: int, rows: int, columns: int, text_tokens: int) -> Arrays:
    """Inputs of `prepare` and the transformer at so many rows and columns of tokens."""
    generator = np.random.default_rng(rows)
    latent = (CHANNELS, 2 * rows, 2 * columns)
    feeds = {
        "noise": generator.standard_normal((batch, *latent)),
        "hidden_states": generator.standard_normal((2 * batch, *latent)),
        "encoder_hidden_states": generator.standard_normal((2 * batch, text_tokens, FEATURES)),
        "pooled_projections": generator.standard_normal((2 * batch, POOLED)),
        "timestep": generator.uniform(0, 1000, 2 * batch),
    }
    return {name: value.astype(np.float32) for name, value in feeds.items()}


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "text_tokens"),
    [(1, 2, 5, 23), (2, 9, 4, 13), (3, 1, 3, 1), (1, TABLE_SIDE, TABLE_SIDE - 1, 28)],
)
def test_transformer_graph_is_the_unpatched_network_at_other_sizes_and_text_lengths(
    graphs: Graphs,
    diffusers_pipeline: StableDiffusion3Pipeline,
    batch: int,
    rows: int,
    columns: int,
    text_tokens: int,
) -> None:
    feeds = random_feeds(batch, rows, columns, text_tokens)
    found = graphs.run("transformer", feeds)["velocity"]
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items() if name != "noise"}
    with torch.inference_mode():
        (expected,) = diffusers_pipeline.transformer(**tensors, return_dict=False)
    # float32 kernels unlike torch's; measured 1e-6
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_every_input_reaches_the_velocity(graphs: Graphs) -> None:
    feeds = random_feeds(1, 4, 6, 12)
    base = graphs.run("transformer", feeds)["velocity"]
    for name in ("timestep", "encoder_hidden_states", "pooled_projections", "hidden_states"):
        moved = {**feeds, name: np.roll(feeds[name], 1, axis=-1)}
        assert np.abs(graphs.run("transformer", moved)["velocity"] - base).max() > 1e-4, name


def test_position_table_is_the_checkpoints_and_no_copy(bundle: Bundle, folder: Path) -> None:
    part = bundle.export.components["transformer"]
    stored = Checkpoint(folder).tensors("transformer")
    assert stored["pos_embed.pos_embed"].shape == (1, TABLE_SIDE**2, 64)
    constants = part.weight_bytes - part.shared_bytes
    assert constants < stored["pos_embed.pos_embed"].length / 10


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (TABLE_SIDE, 1)])
def test_prepare_graph_has_the_pipelines_bits(
    graphs: Graphs, diffusers_pipeline: StableDiffusion3Pipeline, rows: int, columns: int
) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    sizes = (CHANNELS, 8 * rows, 8 * columns)
    latent = diffusers_pipeline.prepare_latents(2, *sizes, torch.float32, "cpu", generators)
    noise = [
        torch.randn(CHANNELS, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(seed))
        for seed in range(2)
    ]
    made = graphs.run("prepare", {"noise": torch.stack(noise).numpy()})
    assert np.array_equal(made["latent"], latent.numpy())
    assert np.array_equal(made["model_input"], torch.cat([latent, latent]).numpy())


def decoded(pipe: StableDiffusion3Pipeline, latents: torch.Tensor) -> Any:
    """What StableDiffusion3Pipeline.__call__ does after its loop."""
    unscaled = (latents / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
    with torch.inference_mode():
        image = pipe.vae.decode(unscaled, return_dict=False)[0]
    return pipe.image_processor.postprocess(image, output_type="np")


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 3)])
def test_decoder_graph_is_what_the_pipeline_does_after_its_loop(
    graphs: Graphs, diffusers_pipeline: StableDiffusion3Pipeline, rows: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, CHANNELS, 2 * rows, 2 * columns, generator=generator)
    image = graphs.run("vae_decoder", {"latent": latent.numpy()})["image"]
    # other float32 convolution kernels than torch's; measured 4e-7
    picture = np.clip(np.moveaxis(image, 1, -1), 0, 1)
    np.testing.assert_allclose(picture, decoded(diffusers_pipeline, latent), rtol=0, atol=1e-5)
    assert image.std() > 0.05


def test_prompts_are_encoded_as_the_pipeline_does(
    pipeline: Pipeline, diffusers_pipeline: StableDiffusion3Pipeline
) -> None:
    found = pipeline.encode([PROMPT, OTHER, ""]).tensors
    assert found["encoder_hidden_states"].shape == (3, CLIP_TOKENS + TEXT_TOKENS, FEATURES)
    for index, prompt in enumerate((PROMPT, OTHER, "")):
        with torch.inference_mode():
            features, _, pooled, _ = diffusers_pipeline.encode_prompt(
                prompt, None, None, max_sequence_length=TEXT_TOKENS
            )
        assert np.array_equal(found["encoder_hidden_states"][index], features[0].numpy())
        assert np.array_equal(found["pooled_projections"][index], pooled[0].numpy())


def diffusers_latent(pipe: StableDiffusion3Pipeline, **changes: Any) -> NDArray[np.float32]:
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "guidance_scale": SCALE,
        "num_inference_steps": STEPS,
        "max_sequence_length": TEXT_TOKENS,
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


def test_grid_is_the_pipelines(
    pipeline: Pipeline, diffusers_pipeline: StableDiffusion3Pipeline
) -> None:
    scheduler = diffusers_pipeline.scheduler
    for steps in (1, 4, 28, 50):
        scheduler.set_timesteps(steps)  # a count alone, as StableDiffusion3Pipeline hands over
        grid = pipeline.grid(steps)
        assert np.array_equal(np.float32(grid.sigmas), scheduler.sigmas.numpy())
        assert np.array_equal(np.float32(grid.timesteps), scheduler.timesteps.numpy())


def test_all_steps_equal_the_diffusers_pipeline(
    pipeline: Pipeline, diffusers_pipeline: StableDiffusion3Pipeline, full: Schedule
) -> None:
    expected = diffusers_latent(diffusers_pipeline)
    assert np.abs(our_latent(pipeline, full) - expected).max() <= LATENT_TOLERANCE


def test_a_schedule_equals_the_diffusers_pipeline_with_our_scheduler(
    pipeline: Pipeline, diffusers_pipeline: StableDiffusion3Pipeline, full: Schedule
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
    pipeline: Pipeline, diffusers_pipeline: StableDiffusion3Pipeline, full: Schedule
) -> None:
    (found,) = pipeline.render([PROMPT], schedule=full)
    expected = decoded(diffusers_pipeline, torch.from_numpy(found.latent)[None])[0]
    assert np.abs(found.pixels - expected).max() <= 1e-4  # float32, another order of sums


def test_scale_and_negative_prompt_are_the_pipelines_by_default(
    pipeline: Pipeline, diffusers_pipeline: StableDiffusion3Pipeline, full: Schedule
) -> None:
    expected = diffusers_latent(diffusers_pipeline, negative_prompt=None, guidance_scale=7.0)
    (found,) = pipeline.render([PROMPT], seed=SEED, schedule=full, noise="torch")
    # guidance multiplies the differences of rounding too
    assert np.abs(found.latent - expected).max() <= 2 * LATENT_TOLERANCE
    assert found.guidance_scale == 7.0
    assert np.abs(found.latent - our_latent(pipeline, full)).max() > 100 * LATENT_TOLERANCE


def test_scale_one_is_diffusers_without_guidance(
    pipeline: Pipeline, diffusers_pipeline: StableDiffusion3Pipeline, full: Schedule
) -> None:
    unguided = diffusers_latent(diffusers_pipeline, guidance_scale=1.0)
    found = our_latent(pipeline, full, guidance_scale=1.0)
    assert np.abs(found - unguided).max() <= LATENT_TOLERANCE


def test_embeddings_survive_the_file(pipeline: Pipeline, full: Schedule, tmp_path: Path) -> None:
    pipeline.encode([PROMPT]).save(tmp_path / "prompt.safetensors")
    (found,) = pipeline.render(
        Conditioning.load(tmp_path / "prompt.safetensors"),
        negative_prompt=NEGATIVE,
        guidance_scale=SCALE,
        seed=SEED,
        schedule=full,
        noise="torch",
    )
    assert np.array_equal(found.latent, our_latent(pipeline, full))


def test_cached_prompts_need_no_encoder(
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
    tensors = {
        **made.tensors,
        "encoder_hidden_states": made.tensors["encoder_hidden_states"][:, 1:],
    }
    with pytest.raises(InputError, match=r"\(28, 48\) .* found \(27, 48\).*takes 12 text tokens"):
        pipeline.render(
            [PROMPT], negative_prompt=Conditioning(made.prompts, tensors), schedule=full
        )


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
    folder: Path, diffusers_pipeline: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    options = RecordOptions(
        size=(HEIGHT, WIDTH), prompts=(PROMPT,), steps=STEPS, samples=1, text_tokens=TEXT_TOKENS
    )
    (recorded,) = stages.record_pipeline(
        Checkpoint(folder), tmp_path, options, note=lambda _: None, report=lambda *_: None
    )
    generator = torch.Generator("cpu").manual_seed(0)
    expected = diffusers_latent(
        diffusers_pipeline, negative_prompt="", guidance_scale=7.0, generator=generator
    )
    assert np.array_equal(recorded.final.reshape(expected.shape), expected)


def test_record_holds_what_a_host_needs(bundle: Bundle) -> None:
    export = bundle.export
    assert (export.guidance.rule, export.grid) == ("classifier_free", "count")
    assert export.text_tokens == TEXT_TOKENS
    assert export.text_buckets == ()
    assert export.resolution.noise_shape == export.resolution.decode_shape == (CHANNELS, 8, 12)
    assert [record.component for record in export.parity] == [
        "prepare",
        "transformer",
        "vae_decoder",
    ]
    for name in ("transformer", "vae_decoder"):
        part = export.components[name]
        assert part.shared_bytes >= 0.95 * part.weight_bytes > 0


@pytest.mark.parametrize("qk_norm", ["rms_norm", None], ids=["SD3.5-large", "SD3-medium"])
def test_the_other_checkpoints_are_like_their_modules(qk_norm: str | None, tmp_path: Path) -> None:
    tiny_pipeline(dual_attention=(), qk_norm=qk_norm).save_pretrained(tmp_path / "tiny")
    exported = export_components(
        tmp_path / "tiny", tmp_path / "out", height=32, width=32, text_tokens=3, parity_bytes=1
    )
    record = next(record for record in exported.parity if record.component == "transformer")
    assert record.blocks == ("transformer_blocks.0", "transformer_blocks.2")
    assert 0 < record.max_abs_error <= record.tolerance
