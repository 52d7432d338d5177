"""The packaged Qwen-Image stand-in: its size, its tokens and what its pictures show."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from meancache_trt import build, standins
from meancache_trt.standins import captions

torch = pytest.importorskip("torch", reason="the stand-in runs on torch")
diffusers = pytest.importorskip("diffusers", reason="the stand-in is a diffusers pipeline")

SPLITS: tuple[standins.Split, ...] = ("calibration", "evaluation", "heldout")
MAX_FOLDER_BYTES = 10_000_000
CALIBRATION_SCALE = 4.0

Sample = Callable[[list[str], int, float], "torch.Tensor"]


@pytest.fixture(scope="module")
def pipeline() -> diffusers.QwenImagePipeline:
    loaded = diffusers.QwenImagePipeline.from_pretrained(standins.path("qwen_image"))
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(torch.float32)


@pytest.fixture(scope="module")
def sample(pipeline: diffusers.QwenImagePipeline) -> Sample:
    def run(prompts: list[str], steps: int, guidance_scale: float) -> torch.Tensor:
        return pipeline(
            prompts,
            negative_prompt=[""] * len(prompts),
            height=64,
            width=64,
            num_inference_steps=steps,
            true_cfg_scale=guidance_scale,
            max_sequence_length=32,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="pt",
        ).images

    return run


def test_folder_fits_its_size_limit() -> None:
    files = [file for file in standins.path("qwen_image").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_FOLDER_BYTES


def test_parts_are_of_the_real_pipelines_classes(pipeline: diffusers.QwenImagePipeline) -> None:
    classes = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert classes == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }


def test_template_before_the_prompt_is_what_the_pipeline_cuts_off(
    pipeline: diffusers.QwenImagePipeline,
) -> None:
    before, _ = pipeline.prompt_template_encode.split("{}")
    ids = pipeline.tokenizer(before).input_ids
    assert len(ids) == pipeline.prompt_template_encode_start_idx == 34
    prompt = standins.DEMO_PROMPTS[1]
    whole = pipeline.tokenizer(pipeline.prompt_template_encode.format(prompt)).input_ids
    assert whole[: len(ids)] == ids
    assert pipeline.tokenizer.decode(whole[len(ids) :]).startswith(prompt)


def test_tokenizer_makes_one_token_of_each_word(pipeline: diffusers.QwenImagePipeline) -> None:
    before, after = pipeline.prompt_template_encode.split("{}")
    around = len(pipeline.tokenizer(before + after).input_ids)
    for prompt in (
        *standins.DEMO_PROMPTS,
        *(p for split in SPLITS for p in standins.prompts(split)),
    ):
        words = len(prompt.replace(",", " ,").replace(".", " .").split())
        ids = pipeline.tokenizer(before + prompt + after).input_ids
        assert len(ids) == words + around <= 34 + 32


def test_sizes_that_are_not_asked_for_are_those_of_the_training() -> None:
    checkpoint = build.find_model("standin/qwen_image")
    assert build.picture_size(checkpoint, None, None) == (64, 64)
    assert build.default_prompts(checkpoint) == tuple(standins.prompts("calibration"))


def test_latents_have_zero_mean_and_unit_variance(pipeline: diffusers.QwenImagePipeline) -> None:
    with torch.inference_mode():
        noise = torch.Generator().manual_seed(0)
        latents = pipeline(
            list(standins.DEMO_PROMPTS),
            negative_prompt=[""] * len(standins.DEMO_PROMPTS),
            height=64,
            width=64,
            num_inference_steps=12,
            true_cfg_scale=CALIBRATION_SCALE,
            max_sequence_length=32,
            generator=noise,
            output_type="latent",
        ).images
    assert latents.shape == (8, 64, 32)
    # Eight pictures are few, and guidance moves them; unscaled latents would be far off.
    assert abs(latents.mean()) < 0.3
    assert 0.7 < latents.std() < 1.4


def test_guidance_scale_changes_the_picture(sample: Sample) -> None:
    prompts = list(standins.DEMO_PROMPTS[:2])
    difference = (sample(prompts, 4, 1.0) - sample(prompts, 4, 5.0)).abs().amax((1, 2, 3))
    assert (difference > 0.05).all()


def test_same_seed_gives_the_same_picture(sample: Sample) -> None:
    prompts = list(standins.DEMO_PROMPTS[:1])
    assert torch.equal(sample(prompts, 2, 4.0), sample(prompts, 2, 4.0))


def test_colour_of_the_shape_follows_the_prompt(sample: Sample) -> None:
    colours = list(captions.COLOUR_RGB)
    prompts = [f"large plain {colour} circle center gray" for colour in colours]
    middle = sample(prompts, 12, CALIBRATION_SCALE)[:, :, 28:36, 28:36].mean((2, 3))
    palette = torch.tensor(list(captions.COLOUR_RGB.values()))
    nearest = torch.cdist(middle, palette).argmin(1)
    # One miss of eight is left to the seed; chance would give one hit.
    assert (nearest == torch.arange(len(colours))).sum() >= 7


def test_background_follows_the_prompt(sample: Sample) -> None:
    backgrounds = list(captions.BACKGROUND_RGB)
    prompts = [f"small plain red circle center {background}" for background in backgrounds]
    corner = sample(prompts, 12, CALIBRATION_SCALE)[:, :, 2:8, 2:8].mean((2, 3))
    palette = torch.tensor(list(captions.BACKGROUND_RGB.values()))
    nearest = torch.cdist(corner, palette).argmin(1)
    # One miss of six is left to the seed; chance would give one hit.
    assert (nearest == torch.arange(len(backgrounds))).sum() >= 5
