from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from numpy.typing import NDArray

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.calibration.baking import BakeOptions, bake_schedules
from meancache_trt.export import detect, export_components
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.flux2 import FLUX2
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from meancache_trt.session import Session
from tests.export.test_pipeline import Arrays, Graphs
from tests.export.tiny_flux2 import CHANNELS, FEATURES, tiny_pipeline

HEIGHT, WIDTH, TEXT_TOKENS = 32, 48, 12
STEPS, SCALE, SEED = 8, 3.0, 3
PROMPT, OTHER = "a red dog", "two cats on a mat"

LATENT_TOLERANCE = 2e-5
"""Float32 sums in another order, over 8 evaluations of values near 1; measured 2e-6."""


@pytest.fixture(scope="module")
def diffusers_pipeline() -> Flux2Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(diffusers_pipeline: Flux2Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux2") / "tiny-flux2"
    diffusers_pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return create_bundle(
        folder.parent / "flux2.mcb",
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
    assert detect(folder) is FLUX2


def random_feeds(batch: int, rows: int, columns: int, text_tokens: int) -> Arrays:
    """Inputs of the transformer but its tables, at so many rows and columns of tokens."""
    generator = np.random.default_rng(rows)
    feeds = {
        "hidden_states": generator.standard_normal((batch, rows * columns, CHANNELS)),
        "encoder_hidden_states": generator.standard_normal((batch, text_tokens, FEATURES)),
        "timestep": generator.uniform(0, 1, batch),
        "guidance": generator.uniform(1, 6, batch),
    }
    return {name: value.astype(np.float32) for name, value in feeds.items()}


def tables(graphs: Graphs, feeds: Arrays, rows: int, columns: int) -> Arrays:
    noise = np.zeros((1, CHANNELS, rows, columns), np.float32)
    text = feeds["encoder_hidden_states"]
    made = graphs.run("prepare", {"noise": noise, "encoder_hidden_states": text})
    return {name: made[name] for name in ("image_rope", "text_rope")}


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "text_tokens"),
    [(1, 2, 5, 23), (2, 9, 4, 13), (3, 1, 3, 1), (1, 25, 31, 28)],
)
def test_transformer_graph_is_the_unpatched_network_at_other_sizes_and_text_lengths(
    graphs: Graphs,
    diffusers_pipeline: Flux2Pipeline,
    batch: int,
    rows: int,
    columns: int,
    text_tokens: int,
) -> None:
    feeds = random_feeds(batch, rows, columns, text_tokens)
    given = {**feeds, **tables(graphs, feeds, rows, columns)}
    found = graphs.run("transformer", given)["velocity"]
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with torch.inference_mode():
        (expected,) = diffusers_pipeline.transformer(
            **tensors,
            img_ids=Flux2Pipeline._prepare_latent_ids(torch.empty(batch, 1, rows, columns)),
            txt_ids=Flux2Pipeline._prepare_text_ids(tensors["encoder_hidden_states"]),
            return_dict=False,
        )
    # float32 kernels unlike torch's; measured 1e-6
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_every_input_reaches_the_velocity(graphs: Graphs) -> None:
    feeds = random_feeds(2, 4, 6, 12)
    feeds |= tables(graphs, feeds, 4, 6)
    base = graphs.run("transformer", feeds)["velocity"]
    for name, value in feeds.items():
        moved = {**feeds, name: np.roll(value, 1, axis=0 if value.ndim < 3 else 1)}
        assert np.abs(graphs.run("transformer", moved)["velocity"] - base).max() > 1e-4, name


def decoded(pipe: Flux2Pipeline, latents: torch.Tensor, rows: int, columns: int) -> Any:
    """What Flux2Pipeline.__call__ does after its loop, by the pipeline that has no loop."""
    ids = pipe._prepare_latent_ids(torch.empty(len(latents), 1, rows, columns))
    normed = pipe._unpack_latents_with_ids(latents, ids)
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(pipe.vae.bn.running_var.view(1, -1, 1, 1) + 1e-4)
    with torch.inference_mode():
        image = pipe.vae.decode(pipe._unpatchify_latents(normed * deviation + mean)).sample
    return pipe.image_processor.postprocess(image, output_type="np")


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 3)])
def test_decoder_graph_is_what_the_pipeline_does_after_its_loop(
    graphs: Graphs, diffusers_pipeline: Flux2Pipeline, rows: int, columns: int
) -> None:
    latent = torch.randn(2, rows * columns, CHANNELS, generator=torch.Generator().manual_seed(0))
    grid = latent.reshape(2, rows, columns, CHANNELS).numpy()
    image = graphs.run("vae_decoder", {"latent": grid})["image"]
    # other float32 convolution kernels than torch's; measured 4e-7
    picture = np.clip(np.moveaxis(image, 1, -1), 0, 1)
    expected = decoded(diffusers_pipeline, latent, rows, columns)
    np.testing.assert_allclose(picture, expected, rtol=0, atol=1e-5)
    assert image.std() > 0.05


def test_prompts_are_encoded_as_the_pipeline_does(
    pipeline: Pipeline, diffusers_pipeline: Flux2Pipeline
) -> None:
    found = pipeline.encode([PROMPT, OTHER, ""]).tensors["encoder_hidden_states"]
    for index, prompt in enumerate((PROMPT, OTHER, "")):
        with torch.inference_mode():
            features, _ = diffusers_pipeline.encode_prompt(prompt, max_sequence_length=TEXT_TOKENS)
        # padding is seen by all layers; another batch may be summed in another order
        np.testing.assert_allclose(found[index], features[0].numpy(), rtol=0, atol=1e-5)


def diffusers_latent(pipe: Flux2Pipeline, **changes: Any) -> NDArray[np.float32]:
    arguments = {
        "prompt": PROMPT,
        "guidance_scale": SCALE,
        "num_inference_steps": STEPS,
        "max_sequence_length": TEXT_TOKENS,
        "generator": torch.Generator("cpu").manual_seed(SEED),
        "output_type": "latent",
        **changes,
    }
    latent: NDArray[np.float32] = pipe(height=HEIGHT, width=WIDTH, **arguments).images[0].numpy()
    return latent


def our_latent(pipeline: Pipeline, schedule: Schedule) -> NDArray[np.float32]:
    (found,) = pipeline.render(
        [PROMPT], guidance_scale=SCALE, seed=SEED, schedule=schedule, noise="torch"
    )
    return found.latent


def test_grid_is_the_pipelines_whose_mu_depends_on_the_steps(
    pipeline: Pipeline, diffusers_pipeline: Flux2Pipeline
) -> None:
    scheduler = diffusers_pipeline.scheduler
    for steps in (1, 4, 28, 50):
        # as Flux2Pipeline hands over for 24 tokens
        mu = compute_empirical_mu(24, steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        grid = pipeline.grid(steps)
        assert np.array_equal(np.float32(grid.sigmas), scheduler.sigmas.numpy())
        assert np.array_equal(np.float32(grid.timesteps), scheduler.timesteps.numpy())


def test_all_steps_equal_the_diffusers_pipeline(
    pipeline: Pipeline, diffusers_pipeline: Flux2Pipeline, full: Schedule
) -> None:
    expected = diffusers_latent(diffusers_pipeline)
    assert np.abs(our_latent(pipeline, full) - expected).max() <= LATENT_TOLERANCE


def test_a_schedule_equals_the_diffusers_pipeline_with_our_scheduler(
    pipeline: Pipeline, diffusers_pipeline: Flux2Pipeline, full: Schedule
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


def test_scale_and_pixels_are_the_pipelines(
    pipeline: Pipeline, diffusers_pipeline: Flux2Pipeline, full: Schedule
) -> None:
    (found,) = pipeline.render([PROMPT], seed=SEED, schedule=full, noise="torch")
    by_default = {
        "prompt": PROMPT,
        "num_inference_steps": STEPS,
        "max_sequence_length": TEXT_TOKENS,
        "generator": torch.Generator("cpu").manual_seed(SEED),
    }
    made = diffusers_pipeline(height=HEIGHT, width=WIDTH, output_type="np", **by_default)
    assert found.guidance_scale == 4.0
    assert np.abs(found.pixels - made.images[0]).max() <= 1e-4  # float32, another order of sums


def test_batch_of_two_equals_two_singles(pipeline: Pipeline, full: Schedule) -> None:
    size = pipeline.resolution()
    noise = np.stack([philox_normal(seed, size.noise_shape) for seed in range(2)])
    prompts = pipeline.encode([PROMPT, OTHER])
    both = Session(pipeline.graphs, full, size, batch=2).run(noise, prompts.tensors, SCALE)
    for index in range(2):
        fed = prompts.select(index).tensors
        single = pipeline.session(full).run(noise[index][None], fed, SCALE)
        # float32 matrix products may be blocked otherwise at another batch, over 8 evaluations
        np.testing.assert_allclose(both.latents[index], single.latents[0], rtol=0, atol=2e-5)


def test_a_recording_has_own_grids_with_the_mu_of_their_steps(
    folder: Path, pipeline: Pipeline, diffusers_pipeline: Flux2Pipeline, tmp_path: Path
) -> None:
    options = RecordOptions(
        size=(HEIGHT, WIDTH), prompts=(PROMPT,), steps=STEPS, samples=1, text_tokens=TEXT_TOKENS
    )
    recorded = stages.record_pipeline(
        Checkpoint(folder), tmp_path, options, note=lambda _: None, report=lambda *_: None
    )
    generator = torch.Generator("cpu").manual_seed(0)
    expected = diffusers_latent(diffusers_pipeline, guidance_scale=4.0, generator=generator)
    (trajectory,) = recorded
    assert np.array_equal(trajectory.final.reshape(expected.shape), expected)
    (own,) = bake_schedules(recorded, [3], BakeOptions("euler", placement="own-grid"))
    assert own.grid == pipeline.grid(3)
    assert pipeline.schedule(own, 4.0) is own


def test_record_holds_what_a_host_needs(bundle: Bundle) -> None:
    export = bundle.export
    assert (export.guidance.rule, export.grid, export.mu) == ("embedded", "linspace", "empirical")
    assert export.text_buckets == ()
    assert export.resolution.noise_shape == (CHANNELS, 4, 6)
    assert [record.component for record in export.parity] == [
        "prepare",
        "transformer",
        "vae_decoder",
    ]
    for name in ("transformer", "vae_decoder"):
        part = export.components[name]
        assert part.shared_bytes >= 0.95 * part.weight_bytes > 0


def test_a_checkpoint_without_embedded_guidance_takes_no_scale(tmp_path: Path) -> None:
    tiny_pipeline(has_guidance=False).save_pretrained(tmp_path / "tiny")
    exported = export_components(
        tmp_path / "tiny", tmp_path / "out", height=32, width=32, text_tokens=3
    )
    assert "guidance" not in exported.components["transformer"].inputs
    assert all(record.max_abs_error <= record.tolerance for record in exported.parity)
