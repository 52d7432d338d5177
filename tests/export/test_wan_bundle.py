"""Tiny Wan checkpoints, exported, against diffusers' pipeline with its own UniPC scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from meancache_trt.bundle import Bundle
from meancache_trt.engine_transformer import EngineTransformer
from meancache_trt.errors import InputError
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.render import Pipeline
from meancache_trt.session import Session
from tests.export.families import shared_export
from tests.export.test_pipeline import Arrays, Graphs
from tests.export.tiny_wan import CHANNELS, FEATURES, tiny_5b
from tests.export.wan_subject import (
    HEIGHT,
    LATENT_TOLERANCE,
    NEGATIVE,
    OTHER,
    PROMPT,
    SCALE,
    SEED,
    STEPS,
    TEXT_TOKENS,
    WIDTH,
    Subject,
    diffusers_video,
    exported,
    our_latent,
    with_scheduler,
)

# diffusers 0.42.1 hands torch tensors to np.array, which NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module", params=["2.1", "2.2 A14B"])
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    if request.param == "2.1":
        shared = shared_export("wan", tmp_path_factory)
        folder, bundle = shared.checkpoint, shared.bundle
    else:
        folder, bundle = request.getfixturevalue("a14b")
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with Pipeline(bundle, embedding_cache="off") as opened:
        yield Subject(pipeline, bundle, opened)


def test_record_holds_what_a_host_needs(subject: Subject) -> None:
    export = subject.bundle.export
    assert (export.guidance.rule, export.grid) == ("classifier_free", "count")
    assert (export.text_buckets, export.text_tokens) == ((), TEXT_TOKENS)
    assert export.resolution.noise_shape == export.resolution.latent_shape
    for name in (*export.transformers, "vae_decoder"):
        part = export.components[name]
        assert part.shared_bytes >= 0.9 * part.weight_bytes > 0


def test_graphs_equal_diffusers_at_three_other_sizes(a14b: tuple[Path, Bundle]) -> None:
    records = a14b[1].export.parity
    assert [record.component for record in records] == [
        "prepare",
        "transformer",
        "transformer_2",
        "vae_decoder",
    ]
    for record in records:
        assert record.max_abs_error <= record.tolerance <= 1e-4
        assert len({size["frames"] for size in record.sizes}) == 3


def test_grid_is_the_pipelines_own(subject: Subject) -> None:
    scheduler = subject.diffusers.scheduler
    for steps in (1, 4, 10, 50):
        scheduler.set_timesteps(steps)
        grid = subject.pipeline.grid(steps)
        assert list(grid.sigmas) == scheduler.sigmas.tolist()
        assert list(grid.timesteps) == scheduler.timesteps.tolist()


def test_the_unipc_schedule_is_the_pipeline_with_its_own_scheduler(subject: Subject) -> None:
    expected = diffusers_video(subject)
    found = our_latent(subject, subject.schedule("unipc"))
    assert np.abs(found - expected).max() <= LATENT_TOLERANCE
    assert np.abs(found - our_latent(subject, subject.schedule())).max() > 100 * LATENT_TOLERANCE


@pytest.mark.parametrize(
    ("method", "nodes"),
    [("euler", range(STEPS)), ("euler", [0, 1, 4, 7]), ("unipc", [0, 2, 3, 6, 8])],
)
def test_a_schedule_is_the_pipeline_with_our_scheduler(
    subject: Subject, method: str, nodes: Any
) -> None:
    schedule = subject.schedule(method, nodes)
    found = our_latent(subject, schedule)
    assert np.abs(found - with_scheduler(subject, schedule)).max() <= LATENT_TOLERANCE


def test_pixels_are_the_pipelines_video(subject: Subject) -> None:
    expected = diffusers_video(subject, output_type="np")
    (found,) = subject.pipeline.render(
        [PROMPT],
        negative_prompt=NEGATIVE,
        guidance_scale=SCALE,
        seed=SEED,
        schedule=subject.schedule("unipc"),
        noise="torch",
    )
    assert found.pixels.shape == (subject.bundle.export.resolution.frames, HEIGHT, WIDTH, 3)
    # what is left of the latents' difference after float32 convolutions
    np.testing.assert_allclose(found.pixels, expected, rtol=0, atol=1e-4)


def test_scale_and_negative_prompt_are_the_pipelines_by_default(subject: Subject) -> None:
    expected = diffusers_video(subject, negative_prompt=None, guidance_scale=5.0)
    (found,) = subject.pipeline.render(
        [PROMPT], seed=SEED, schedule=subject.schedule("unipc"), noise="torch"
    )
    assert np.abs(found.latent - expected).max() <= LATENT_TOLERANCE


def test_prompts_are_encoded_as_the_pipeline_does(subject: Subject) -> None:
    prompts = [PROMPT, OTHER, "", "  two &amp; more words than there are tokens "]
    found = subject.pipeline.encode(prompts).tensors["encoder_hidden_states"]
    assert found.shape == (4, TEXT_TOKENS, FEATURES)
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            features, _ = subject.diffusers.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
            )
        assert np.array_equal(found[index], features[0].numpy())


def test_batch_of_two_equals_two_singles(subject: Subject) -> None:
    pipeline, schedule = subject.pipeline, subject.schedule("euler", [0, 1, 4, 7])
    size = pipeline.resolution()
    noise = np.stack([philox_normal(seed, size.noise_shape) for seed in range(2)])
    prompts, negatives = pipeline.encode([PROMPT, OTHER]), pipeline.encode([NEGATIVE, ""])
    session = Session(pipeline.graphs, schedule, size, batch=2)
    both = session.run(noise, prompts.followed_by(negatives).tensors, SCALE)
    for index in range(2):
        fed = prompts.select(index).followed_by(negatives.select(index))
        single = pipeline.session(schedule).run(noise[index][None], fed.tensors, SCALE)
        # float32 matrix products may be blocked otherwise at another batch, over 4 evaluations
        np.testing.assert_allclose(both.latents[index], single.latents[0], rtol=0, atol=2e-5)


def random_feeds(size: tuple[int, ...]) -> Arrays:
    generator = np.random.default_rng(0)
    feeds = {
        "noise": generator.standard_normal((1, *size)),
        "hidden_states": generator.standard_normal((2, *size)),
        "encoder_hidden_states": generator.standard_normal((2, TEXT_TOKENS, FEATURES)),
        "timestep": generator.uniform(0, 1000, 2),
    }
    return {name: value.astype(np.float32) for name, value in feeds.items()}


def test_every_input_reaches_the_velocity(a14b: tuple[Path, Bundle]) -> None:
    graphs = Graphs(a14b[1].directory, a14b[1].export)
    feeds = random_feeds((CHANNELS, 3, 4, 6))
    feeds |= graphs.run("prepare", feeds)
    base = graphs.run("transformer", feeds)["velocity"]
    assert np.abs(graphs.run("transformer_2", feeds)["velocity"] - base).max() > 1e-2
    for name in ("timestep", "encoder_hidden_states", "hidden_states", "rope_cos", "rope_sin"):
        moved = {**feeds, name: feeds[name] * np.float32(0.5)}
        assert np.abs(graphs.run("transformer", moved)["velocity"] - base).max() > 1e-4, name


def test_the_engine_stands_in_the_pipeline(subject: Subject) -> None:
    originals = subject.diffusers.components
    expected = diffusers_video(subject)
    parts = subject.bundle.export.transformers
    for part in parts:
        setattr(subject.diffusers, part, EngineTransformer(subject.bundle, part=part))
    try:
        assert np.abs(diffusers_video(subject) - expected).max() <= LATENT_TOLERANCE
    finally:
        for part in parts:
            setattr(subject.diffusers, part, originals[part])


def test_timesteps_that_differ_within_a_sample_are_refused(subject: Subject) -> None:
    times = torch.full((2, 18), 700.0)
    times[1, :6] = 0.0
    latent, text = torch.zeros(2, CHANNELS, 3, 4, 6), torch.zeros(2, TEXT_TOKENS, FEATURES)
    engine = EngineTransformer(subject.bundle)
    with pytest.raises(InputError, match="one timestep for all tokens"):
        engine(latent, times, text)


def test_timesteps_of_each_token_and_patches_of_pixels_are_followed(tmp_path: Path) -> None:
    pipe = tiny_5b()
    _, bundle = exported(pipe, tmp_path, width=64)
    with Pipeline(bundle, embedding_cache="off") as pipeline:
        subject = Subject(pipe, bundle, pipeline)
        (found,) = pipeline.render(
            [PROMPT],
            negative_prompt=NEGATIVE,
            guidance_scale=SCALE,
            seed=SEED,
            schedule=subject.schedule("unipc"),
            noise="torch",
        )
    latent, video = (diffusers_video(subject, width=64, output_type=o) for o in ("latent", "np"))
    assert np.abs(found.latent - latent).max() <= LATENT_TOLERANCE
    np.testing.assert_allclose(found.pixels, video, rtol=0, atol=1e-4)
    pipe.transformer = EngineTransformer(bundle)
    assert np.abs(diffusers_video(subject, width=64) - latent).max() <= LATENT_TOLERANCE
