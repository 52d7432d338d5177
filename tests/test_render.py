from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from meancache_trt import standins
from meancache_trt.bundle import Bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.errors import BundleError, InputError, ScheduleError
from meancache_trt.export.tiles import space_axes
from meancache_trt.manifest import Tiling
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.files import write_tensors
from meancache_trt.meancache.schedule import (
    Evidence,
    ModelReference,
    Schedule,
    bake,
    save_schedule,
)
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.render import Pipeline
from tests.conftest import STEPS

PROMPT = "large plain red circle left gray"
OTHER = "small striped blue star right pink"
SEED = 3

LATENT_TOLERANCE = 1e-4
"""Float32 sums in another order, over 50 evaluations of a network of values near 1."""


@pytest.fixture(scope="module")
def diffusers_pipeline() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(standins.path("flux"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_latent(pipe: FluxPipeline) -> np.ndarray:
    return (
        pipe(
            PROMPT,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=3.5,
            max_sequence_length=32,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="latent",
        )
        .images[0]
        .numpy()
    )


def calibrated(pipeline: Pipeline, **changes: object) -> Schedule:
    """A schedule tied to the bundle's model, grid and guidance scale, as calibration makes them."""
    model = pipeline.bundle.export.model
    schedule = bake(
        "euler",
        pipeline.grid(STEPS),
        [0, 10, 30],
        model=ModelReference(name=model.name, digest=model.digest),
        guidance_scale=3.5,
        calibration=Evidence(samples=1, seconds=0.0),
    )
    return msgspec.structs.replace(schedule, **changes)


def test_all_steps_equal_the_diffusers_pipeline(pipeline, diffusers_pipeline):
    expected = diffusers_latent(diffusers_pipeline)
    found = pipeline.render([PROMPT], seed=SEED, schedule="full", noise="torch")[0].latent
    assert np.abs(found - expected).max() <= LATENT_TOLERANCE


@pytest.mark.parametrize("name", ["b10", "b6"])
def test_a_schedule_equals_the_diffusers_pipeline_with_our_scheduler(
    pipeline, diffusers_pipeline, name
):
    stock = diffusers_pipeline.scheduler
    schedule = pipeline.bundle.schedule(name)
    diffusers_pipeline.scheduler = MeanCacheScheduler.from_schedule(schedule, stock)
    try:
        expected = diffusers_latent(diffusers_pipeline)
    finally:
        diffusers_pipeline.scheduler = stock
    found = pipeline.render([PROMPT], seed=SEED, schedule=name, noise="torch")[0].latent
    assert np.abs(found - expected).max() <= LATENT_TOLERANCE


def diffusers_picture(pipe: FluxPipeline, packed: np.ndarray) -> np.ndarray:
    latent = pipe._unpack_latents(torch.from_numpy(packed)[None], 64, 64, pipe.vae_scale_factor)
    latent = latent / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.inference_mode():
        picture = pipe.vae.decode(latent, return_dict=False)[0]
    return pipe.image_processor.postprocess(picture, output_type="np")[0]


def test_pixels_equal_diffusers_decoding(pipeline, diffusers_pipeline):
    found = pipeline.render([PROMPT], seed=SEED, schedule="b10")[0]
    expected = diffusers_picture(diffusers_pipeline, found.latent)
    assert np.abs(found.pixels - expected).max() <= 1e-4  # float32, another order of sums


def test_vae_tiling_equals_diffusers_tiled_decoding(pipeline, diffusers_pipeline, monkeypatch):
    tiles = Tiling(space=space_axes(32, 24, unit=8, latent_axis=1, image_axis=2))
    export = msgspec.structs.replace(pipeline.bundle.export, tiling=tiles)
    manifest = msgspec.structs.replace(pipeline.bundle.manifest, export=export)
    vae = diffusers_pipeline.vae
    monkeypatch.setattr(vae, "tile_sample_min_size", 32)
    monkeypatch.setattr(vae, "tile_latent_min_size", 8)
    monkeypatch.setattr(vae, "use_tiling", True)
    with Pipeline(Bundle(pipeline.bundle.directory, manifest)) as own:
        whole, tiled = (
            own.render([PROMPT], seed=SEED, schedule="b6", vae_tiling=vae_tiling)[0]
            for vae_tiling in (False, True)
        )
    expected = diffusers_picture(diffusers_pipeline, tiled.latent)
    assert np.abs(tiled.pixels - expected).max() <= 1e-4  # float32, another order of sums
    assert np.abs(whole.pixels - expected).max() > 1e-3


def test_vae_tiling_leaves_a_picture_of_one_tile_whole(pipeline):
    assert pipeline.bundle.export.tiling.space[0].tile * 8 == 64
    whole = pipeline.render([PROMPT], seed=SEED, schedule="b6")[0]
    asked_for = pipeline.render([PROMPT], seed=SEED, schedule="b6", vae_tiling=True)[0]
    assert np.array_equal(asked_for.pixels, whole.pixels)


def test_the_same_render_gives_the_same_file(pipeline, tmp_path):
    for name in ("a.png", "b.png"):
        pipeline.render([PROMPT], seed=SEED, schedule="b10")[0].save(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_does_not_depend_on_its_place_in_the_list(pipeline):
    alone = pipeline.render([OTHER], seed=SEED, schedule="b6")[0]
    among = pipeline.render([PROMPT, OTHER], seed=[1, SEED], schedule="b6")[1]
    assert np.array_equal(alone.pixels, among.pixels)


def test_seed_and_prompt_matter(pipeline):
    first, other_seed = pipeline.render([PROMPT, PROMPT], seed=[1, 2], schedule="b6")
    other_prompt = pipeline.render([OTHER], seed=1, schedule="b6")[0]
    assert np.abs(first.pixels - other_seed.pixels).mean() > 0.01
    assert np.abs(first.pixels - other_prompt.pixels).mean() > 0.01


def test_a_file_tells_how_it_was_made(pipeline, tmp_path):
    pipeline.render([PROMPT], seed=SEED, schedule="b10")[0].save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        facts = dict(picture.info)
        assert picture.size == (64, 64)
    assert facts["prompt"] == PROMPT
    assert facts["seed"] == str(SEED)
    assert facts["schedule"] == "b10"
    assert facts["noise"] == "philox"
    addition = pipeline.bundle.manifest.additions["schedules/b10"]
    assert facts["schedule_digest"] == addition.sha256
    assert facts["guidance_scale"] == "3.5"
    assert facts["bundle_id"] == pipeline.bundle.manifest.bundle_id


@pytest.mark.parametrize(("wanted", "budget"), [("b6", 6), (10, 10), ("10", 10), (50, 50)])
def test_a_schedule_is_found_by_name_or_budget(pipeline, wanted, budget):
    assert pipeline.schedule(wanted, 3.5).budget == budget


def test_a_budget_that_is_not_there_lists_those_that_are(pipeline):
    with pytest.raises(BundleError, match=r"no schedule of 11 evaluations.*\[50, 10, 6\]"):
        pipeline.schedule(11, 3.5)


def test_a_budget_prefers_the_calibrated_schedule_and_is_never_a_guess(bundle):
    with Pipeline(Bundle.open(bundle)) as own:
        own.bundle.add_schedule(bake("ab2", own.grid(STEPS), [0, 9, 30], name="a"))
        own.bundle.add_schedule(bake("euler", own.grid(STEPS), [0, 9, 30], name="b"))
        with pytest.raises(BundleError, match="several schedules of 3 evaluations: a, b"):
            own.schedule(3)
        own.bundle.add_schedule(msgspec.structs.replace(calibrated(own), name="c"))
        assert own.schedule(3).name == "c"


def test_a_schedule_file_is_accepted(pipeline, tmp_path):
    save_schedule(calibrated(pipeline), tmp_path / "mine.json")
    assert pipeline.schedule(tmp_path / "mine.json", 3.5).budget == 3


def test_a_schedule_of_another_guidance_scale_is_refused(pipeline):
    with pytest.raises(ScheduleError, match=r"guidance scale 3\.5, found 5"):
        pipeline.render([PROMPT], schedule=calibrated(pipeline), guidance_scale=5.0)


def test_the_schedules_own_guidance_scale_is_the_default(pipeline):
    schedule = calibrated(pipeline, guidance_scale=2.0)
    by_default = pipeline.render([PROMPT], schedule=schedule)[0]
    asked_for = pipeline.render([PROMPT], schedule=schedule, guidance_scale=2.0)[0]
    assert by_default.guidance_scale == 2.0
    assert np.array_equal(by_default.pixels, asked_for.pixels)


def test_a_calibrated_schedule_of_another_grid_is_refused(pipeline):
    other = bake(
        "euler", make_grid(STEPS, shift=2.0), [0, 9], calibration=Evidence(samples=1, seconds=0.0)
    )
    with pytest.raises(ScheduleError, match=r"another grid.*shift 2 against.*shift 3"):
        pipeline.schedule(other, 3.5)


def test_an_analytic_schedule_of_another_grid_is_folded_again(pipeline):
    other = bake("euler", make_grid(STEPS, shift=2.0), [0, 9])
    assert pipeline.schedule(other, 3.5).grid.sigmas == pipeline.grid(STEPS).sigmas


def test_a_schedule_of_another_model_is_refused(pipeline):
    other = calibrated(pipeline, model=ModelReference(name="else", digest="0" * 64))
    with pytest.raises(ScheduleError, match="calibrated on 'else'"):
        pipeline.schedule(other, 3.5)


def test_a_schedule_of_a_far_precision_is_refused(pipeline):
    with pytest.raises(ScheduleError, match="calibrated in float8, this network is float32"):
        pipeline.schedule(calibrated(pipeline, precision="float8"), 3.5)


def test_a_schedule_of_a_near_precision_is_taken_and_keeps_saying_so(pipeline):
    found = pipeline.schedule(calibrated(pipeline, precision="bfloat16"), 3.5)
    assert found.precision == "bfloat16"


def test_another_size_is_refused_with_the_one_there_is(pipeline):
    with pytest.raises(BundleError, match="renders 64x64, found 128x64"):
        pipeline.render([PROMPT], width=128)


def test_a_number_of_seeds_that_does_not_fit_is_refused(pipeline):
    with pytest.raises(InputError, match="2 prompts need 2 seeds"):
        pipeline.render([PROMPT, OTHER], seed=[1, 2, 3])


@pytest.mark.parametrize("negative", ["blurry", [""]])
def test_a_negative_prompt_is_refused_where_it_would_have_no_effect(pipeline, negative):
    with pytest.raises(InputError, match="no classifier-free guidance"):
        pipeline.render([PROMPT], negative_prompt=negative)


def test_a_cancelled_render_does_not_harm_the_next(pipeline):
    def cancel(*_: int) -> None:
        raise InterruptedError

    expected = pipeline.render([PROMPT], seed=SEED, schedule="b6")[0]
    with pytest.raises(InterruptedError):
        pipeline.render([OTHER], schedule="b6", on_evaluation=cancel)
    again = pipeline.render([PROMPT], seed=SEED, schedule="b6")[0]
    assert np.array_equal(again.pixels, expected.pixels)


def test_embeddings_survive_the_file(pipeline, tmp_path):
    made = pipeline.encode([PROMPT, OTHER])
    made.save(tmp_path / "prompts.safetensors")
    read = Conditioning.load(tmp_path / "prompts.safetensors")
    assert read.prompts == (PROMPT, OTHER)
    assert all(np.array_equal(read.tensors[name], made.tensors[name]) for name in made.tensors)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_file_that_holds_no_embeddings_is_refused(tmp_path, content):
    path = tmp_path / "prompts.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="meancache-trt encode"):
        Conditioning.load(path)


def test_rendering_from_embeddings_needs_no_torch(pipeline, shared_bundle: Path, tmp_path):
    file = tmp_path / "prompts.safetensors"
    pipeline.encode([PROMPT]).save(file)
    script = f"""
import sys
import meancache_trt
forbidden = {{"torch", "diffusers", "transformers", "onnxruntime", "tensorrt", "tensorrt_rtx"}}
assert not forbidden & set(sys.modules), forbidden & set(sys.modules)
prompts = meancache_trt.Conditioning.load({str(file)!r})
with meancache_trt.load({str(shared_bundle)!r}) as pipeline:
    pipeline.render(prompts, schedule="b6")[0].save({str(tmp_path / "a.png")!r})
assert not (forbidden - {{"onnxruntime"}}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    expected = pipeline.render([PROMPT], schedule="b6")[0]
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected.image))


def test_the_public_names_are_few_and_exist():
    import meancache_trt  # noqa: PLC0415

    assert len(meancache_trt.__all__) <= 12
    assert all(hasattr(meancache_trt, name) for name in meancache_trt.__all__)
    assert Bundle is meancache_trt.Bundle


@pytest.mark.parametrize("prompts", ["5", "[]", "[1]", '["a", "b"]', "nonsense"])
def test_embeddings_whose_prompts_do_not_fit_are_refused(tmp_path, prompts):
    path = tmp_path / "prompts.safetensors"
    write_tensors(path, {"pooled": np.zeros((1, 4), np.float32)}, {"prompts": prompts})
    with pytest.raises(InputError, match="meancache-trt encode"):
        Conditioning.load(path)
