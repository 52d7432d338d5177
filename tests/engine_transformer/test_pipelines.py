"""EngineTransformer in unmodified diffusers pipelines, against the pipelines' own transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
)
from PIL import Image

from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import make_grid
from tests.engine_transformer.subjects import (
    HEIGHT,
    LATENT_TOLERANCE,
    STEPS,
    WIDTH,
    Subject,
    flux_call,
    mask,
    random,
)
from tests.export import tiny_flux


def picture() -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return Image.fromarray(values)


def half() -> Image.Image:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:, WIDTH // 2 :] = 255
    return Image.fromarray(values)


FLUX = {"prompt": "a red dog", "max_sequence_length": tiny_flux.TEXT_TOKENS, "guidance_scale": 3.0}
QWEN = {"prompt": ["a red dog", "two cats, at night"], "negative_prompt": ["blurry", ""]}
Z_IMAGE = {
    "prompt": ["a red dog", "two cats, at night and far away"],
    "negative_prompt": ["blurry", ""],
    "max_sequence_length": 64,
}
SD3 = {**QWEN, "max_sequence_length": tiny_flux.TEXT_TOKENS, "guidance_scale": 4.0}
FLUX2 = {**FLUX, "prompt": ["a red dog", "two cats, at night"]}
RUNS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "flux": ("flux", None, FLUX),
    "flux true guidance": ("flux", None, {**FLUX, "negative_prompt": "b", "true_cfg_scale": 2.0}),
    "flux image to image": (
        "flux",
        FluxImg2ImgPipeline,
        {**FLUX, "image": picture(), "strength": 0.7},
    ),
    "flux inpaint": (
        "flux",
        FluxInpaintPipeline,
        {**FLUX, "image": picture(), "mask_image": half(), "strength": 0.7},
    ),
    "qwen": ("qwen", None, {**QWEN, "true_cfg_scale": 4.0}),
    "qwen image to image": (
        "qwen",
        QwenImageImg2ImgPipeline,
        {**QWEN, "image": picture(), "true_cfg_scale": 4.0, "strength": 0.7},
    ),
    "z_image": ("z_image", None, {**Z_IMAGE, "guidance_scale": 4.0}),
    "z_image without guidance": ("z_image", None, {**Z_IMAGE, "guidance_scale": 0.0}),
    "z_image truncated and capped": (
        "z_image",
        None,
        {**Z_IMAGE, "guidance_scale": 4.0, "cfg_truncation": 0.5, "cfg_normalization": 1.1},
    ),
    "z_image image to image": (
        "z_image",
        ZImageImg2ImgPipeline,
        {**Z_IMAGE, "image": picture(), "guidance_scale": 4.0, "strength": 0.7},
    ),
    "hunyuan": (
        "hunyuan",
        None,
        {
            "prompt_embeds": random(2, 12, 48),
            "pooled_prompt_embeds": random(2, 40),
            "prompt_attention_mask": mask([5, 12], 12),
            "num_frames": 9,
        },
    ),
    "sd3": ("sd3", None, SD3),
    "wan": ("wan", None, {**QWEN, "max_sequence_length": 12, "num_frames": 9}),
    "sd3 image to image": (
        "sd3",
        StableDiffusion3Img2ImgPipeline,
        {**SD3, "image": picture(), "strength": 0.7},
    ),
    "flux2": ("flux2", None, FLUX2),
    "flux2 looking at two pictures": (
        "flux2",
        None,
        # of 64 pixels a side at least, or Flux2Pipeline refuses them
        {**FLUX2, "image": [picture().resize((96, 64)), half().convert("RGB").resize((64, 64))]},
    ),
}


def build(name: str, request: pytest.FixtureRequest) -> tuple[Any, Subject, dict[str, Any]]:
    """A pipeline of its own, with components that are shared."""
    family, kind, arguments = RUNS[name]
    subject: Subject = request.getfixturevalue(family)
    pipeline = (kind or type(subject.pipeline))(**subject.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, subject, arguments


def render(pipeline: Any, arguments: Mapping[str, Any], **changes: Any) -> Any:
    settings = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(4),
        "output_type": "latent",
        "return_dict": False,
    }
    given = {**settings, **arguments, **changes}
    # ZImagePipeline writes its chat template into the lists of prompts that it is given.
    return pipeline(**{n: list(v) if isinstance(v, list) else v for n, v in given.items()})[0]


def both(
    name: str, request: pytest.FixtureRequest, **changes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline makes with its own transformer, and with the engine."""
    pipeline, subject, arguments = build(name, request)
    expected = render(pipeline, arguments, **changes)
    pipeline.transformer = subject.engine()
    return expected, render(pipeline, arguments, **changes)


@pytest.mark.parametrize("name", RUNS)
def test_a_pipeline_ends_where_it_does_with_its_own_transformer(
    name: str, request: pytest.FixtureRequest
) -> None:
    expected, found = both(name, request)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=LATENT_TOLERANCE)


@pytest.mark.parametrize("name", ["flux", "qwen", "hunyuan", "z_image", "sd3", "wan", "flux2"])
def test_a_schedule_evaluates_the_engine_at_its_nodes_alone(
    name: str, request: pytest.FixtureRequest
) -> None:
    pipeline, subject, arguments = build(name, request)
    schedule = bake("official", make_grid(STEPS), [0, 1, 3, 4], [1, 2, 1])
    pipeline.scheduler = MeanCacheScheduler.from_schedule(schedule, pipeline.scheduler)
    expected = render(pipeline, arguments)
    pipeline.transformer = subject.engine()
    torch.testing.assert_close(render(pipeline, arguments), expected, rtol=0, atol=LATENT_TOLERANCE)
    assert pipeline.num_timesteps == 4


def test_a_schedule_begun_midway_runs_on_the_engine(request: pytest.FixtureRequest) -> None:
    pipeline, subject, arguments = build("flux image to image", request)
    schedule = bake("official", make_grid(STEPS), [0, 1, 3, 4], [1, 2, 1])
    scheduler = MeanCacheScheduler.from_schedule(schedule, pipeline.scheduler)
    pipeline.scheduler = scheduler.for_strength(0.7)
    expected = render(pipeline, arguments, strength=1.0)
    pipeline.transformer = subject.engine()
    found = render(pipeline, arguments, strength=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=LATENT_TOLERANCE)


def test_two_pictures_of_one_prompt(request: pytest.FixtureRequest) -> None:
    for name in ("flux", "qwen"):
        expected, found = both(name, request, num_images_per_prompt=2)
        assert len(found) in (2, 4)
        assert not torch.equal(found[0], found[1])
        torch.testing.assert_close(found, expected, rtol=0, atol=LATENT_TOLERANCE)


def test_pictures_are_the_same_to_a_level(request: pytest.FixtureRequest) -> None:
    expected, found = both("flux inpaint", request, output_type="pil")
    pixels = [np.asarray(images[0]).astype(int) for images in (expected, found)]
    assert pixels[0].shape == (HEIGHT, WIDTH, 3)
    # a level is 4e-3, so that what differs by 1e-5 rounds otherwise here and there
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert pixels[0].std() > 10


def test_a_callback_sees_and_changes_every_step(request: pytest.FixtureRequest) -> None:
    seen: list[int] = []

    def halve(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] / 2}

    expected, found = both("flux", request, callback_on_step_end=halve)
    assert seen == list(range(STEPS)) * 2
    torch.testing.assert_close(found, expected, rtol=0, atol=LATENT_TOLERANCE)
    plain, _ = both("flux", request)
    assert (plain - expected).abs().max() > 0.1


def test_a_half_precision_pipeline_gets_its_own_dtype(flux: Subject) -> None:
    engine, call = flux.engine(), flux_call(2, 3, 4, 5)
    low = {
        name: value.bfloat16() if name not in ("img_ids", "txt_ids") else value
        for name, value in call.items()
    }
    found = engine(**low).sample
    assert found.dtype == torch.bfloat16
    # computed in float32 all the same, and rounded once
    exact = engine(**{name: value.float() for name, value in low.items()}).sample
    assert torch.equal(found, exact.bfloat16())


def test_another_pipeline_is_made_from_one_with_an_engine(flux: Subject) -> None:
    pipeline = FluxPipeline(**flux.pipeline.components)
    pipeline.transformer = flux.engine()
    other = FluxImg2ImgPipeline.from_pipe(pipeline)
    assert other.transformer is pipeline.transformer
    assert other.to("cpu").device == torch.device("cpu")


def test_a_pipeline_is_loaded_without_the_transformers_weights(flux: Subject) -> None:
    checkpoint = flux.bundle.directory.parent / "checkpoint"
    pipeline = FluxPipeline.from_pretrained(checkpoint, transformer=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer = flux.engine()
    expected = render(FluxPipeline(**flux.pipeline.components), FLUX)
    torch.testing.assert_close(render(pipeline, FLUX), expected, rtol=0, atol=LATENT_TOLERANCE)
