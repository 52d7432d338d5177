"""The packaged HunyuanVideo stand-in: its size, its prompts and what its videos show."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.export import detect
from meancache_trt.export.family import default_frames
from meancache_trt.standins import captions, video_captions

torch = pytest.importorskip("torch", reason="the stand-in runs on torch")
diffusers = pytest.importorskip("diffusers", reason="the stand-in is a diffusers pipeline")

from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import (  # noqa: E402  after the skips
    DEFAULT_PROMPT_TEMPLATE,
)

NAME = "hunyuan_video"
SPLITS: tuple[standins.Split, ...] = ("calibration", "evaluation", "heldout")
MAX_FOLDER_BYTES = 10_000_000

Sample = Callable[[list[str], int, float], "torch.Tensor"]


@pytest.fixture(scope="module")
def pipeline() -> diffusers.HunyuanVideoPipeline:
    loaded = diffusers.HunyuanVideoPipeline.from_pretrained(standins.path(NAME)).to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def sample(pipeline: diffusers.HunyuanVideoPipeline) -> Sample:
    def run(prompts: list[str], steps: int, guidance_scale: float) -> torch.Tensor:
        return pipeline(
            prompts,
            height=48,
            width=48,
            num_frames=9,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=32,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="pt",
        ).frames

    return run


def test_folder_fits_its_size_limit() -> None:
    files = [file for file in standins.path(NAME).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_FOLDER_BYTES


def test_build_takes_the_size_that_it_was_trained_at() -> None:
    checkpoint = stages.find_model(f"standin/{NAME}")
    family = detect(checkpoint.path)
    configs = checkpoint.configs(("vae", "text_encoder"))
    assert stages.picture_size(checkpoint, None, None) == (48, 48)
    assert default_frames(family, configs) == 9
    assert family.default_text_tokens(configs) == 32


def test_build_calibrates_with_prompts_of_videos() -> None:
    prompts = stages.default_prompts(stages.find_model(f"standin/{NAME}"))
    assert prompts == video_captions.split_prompts("calibration")
    assert not set(prompts) & set(captions.split_prompts("calibration"))


def test_prompt_splits_are_large_and_hold_no_prompt_twice() -> None:
    for split in SPLITS:
        prompts = standins.prompts(split, NAME)
        assert len(prompts) >= 512
        assert len(set(prompts)) == len(prompts)


def test_prompt_splits_share_no_scene() -> None:
    for one, other in combinations(SPLITS, 2):
        scenes = (set(video_captions.split_scenes(split)) for split in (one, other))
        assert not set.intersection(*scenes)


def test_heldout_scenes_are_not_trained_on() -> None:
    heldout = set(video_captions.split_scenes("heldout"))
    assert not heldout & set(video_captions.training_scenes())


def test_words_of_motion_name_nothing_else() -> None:
    words = {
        word
        for phrases in video_captions.MOTION_PHRASES.values()
        for phrase in phrases
        for word in phrase.split()
    }
    assert words & set(captions.vocabulary()) <= {"at"}


def test_template_before_the_prompt_has_as_many_tokens_as_the_pipeline_cuts_off(
    pipeline: diffusers.HunyuanVideoPipeline,
) -> None:
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    prefix = pipeline.tokenizer(template.split("{}")[0]).input_ids
    assert len(prefix) == DEFAULT_PROMPT_TEMPLATE["crop_start"] == 95
    whole = pipeline.tokenizer(template.format("large plain red circle")).input_ids
    assert whole[:95] == prefix
    assert pipeline.tokenizer.decode(whole[95:]) == "large plain red circle<|eot_id|>"


def test_tokenizers_know_every_prompt(pipeline: diffusers.HunyuanVideoPipeline) -> None:
    llama, clip = pipeline.tokenizer, pipeline.tokenizer_2
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    for prompt in (
        *standins.DEMO_VIDEO_PROMPTS,
        *(prompt for split in SPLITS for prompt in standins.prompts(split, NAME)),
    ):
        words = len(prompt.replace(",", " ,").replace(".", " .").split())
        llama_ids, clip_ids = llama(template.format(prompt)).input_ids, clip(prompt).input_ids
        assert llama.unk_token_id not in llama_ids
        assert len(llama_ids) == 95 + words + 1 <= 95 + 32
        assert len(clip_ids) == words + 2 <= 77


def test_guidance_scale_changes_the_video(sample: Sample) -> None:
    prompts = list(standins.DEMO_VIDEO_PROMPTS[:2])
    difference = (sample(prompts, 4, 1.0) - sample(prompts, 4, 6.0)).abs().amax((1, 2, 3, 4))
    assert (difference > 0.05).all()


def test_same_seed_gives_the_same_video(sample: Sample) -> None:
    prompts = list(standins.DEMO_VIDEO_PROMPTS[:1])
    assert torch.equal(sample(prompts, 2, 6.0), sample(prompts, 2, 6.0))


def test_colour_of_the_shape_follows_the_prompt(sample: Sample) -> None:
    colours = list(captions.COLOUR_RGB)
    prompts = [f"large plain {colour} square center gray still" for colour in colours]
    middle = sample(prompts, 12, 6.0)[:, :, :, 21:27, 21:27].mean((1, 3, 4))
    palette = torch.tensor(list(captions.COLOUR_RGB.values()))
    nearest = torch.cdist(middle, palette).argmin(1)
    # One miss of eight is left to the seed; chance would give one hit.
    assert (nearest == torch.arange(len(colours))).sum() >= 7


def test_motion_of_the_shape_follows_the_prompt(sample: Sample) -> None:
    prompts = [
        f"small plain {colour} circle center black {motion}"
        for motion in ("rising", "falling", "still")
        for colour in ("white", "yellow", "cyan")
    ]
    brightness = sample(prompts, 12, 6.0).sum(2)
    rows = torch.arange(48.0)
    weight = (brightness - brightness.mean((2, 3), keepdim=True)).clamp(min=0).sum(3)
    height = (weight * rows).sum(2) / weight.sum(2)
    rising, falling, still = (height[:, -1] - height[:, 0]).view(3, 3)
    # Drawings move by 25 rows of 48; half of that leaves room for blur and for the seed.
    assert (rising < -12).all()
    assert (falling > 12).all()
    assert (still.abs() < 6).all()
