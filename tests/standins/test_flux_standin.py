"""The packaged FLUX.1-dev stand-in: its size, its prompts and what its pictures show."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations

import pytest

from meancache_trt import standins
from meancache_trt.errors import InputError
from meancache_trt.standins import captions

torch = pytest.importorskip("torch", reason="the stand-in runs on torch")
diffusers = pytest.importorskip("diffusers", reason="the stand-in is a diffusers pipeline")

SPLITS: tuple[standins.Split, ...] = ("calibration", "evaluation", "heldout")
MAX_FOLDER_BYTES = 10_000_000

Sample = Callable[[list[str], int, float], "torch.Tensor"]


@pytest.fixture(scope="module")
def pipeline() -> diffusers.FluxPipeline:
    loaded = diffusers.FluxPipeline.from_pretrained(standins.path("flux")).to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def sample(pipeline: diffusers.FluxPipeline) -> Sample:
    def run(prompts: list[str], steps: int, guidance_scale: float) -> torch.Tensor:
        return pipeline(
            prompts,
            height=64,
            width=64,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=32,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="pt",
        ).images

    return run


def test_importing_standins_does_not_import_torch() -> None:
    code = "import sys, meancache_trt.standins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_folder_fits_its_size_limit() -> None:
    files = [file for file in standins.path("flux").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_FOLDER_BYTES


def test_path_names_the_known_standins_when_the_name_is_unknown() -> None:
    with pytest.raises(InputError, match="flux"):
        standins.path("no-such-model")


def test_prompt_splits_are_large_and_hold_no_prompt_twice() -> None:
    for split in SPLITS:
        prompts = standins.prompts(split)
        assert len(prompts) >= 512
        assert len(set(prompts)) == len(prompts)


def test_prompt_splits_share_no_scene() -> None:
    for one, other in combinations(SPLITS, 2):
        assert not set(captions.split_scenes(one)) & set(captions.split_scenes(other))


def test_heldout_scenes_are_not_trained_on() -> None:
    assert not set(captions.split_scenes("heldout")) & set(captions.training_scenes())


def test_tokenizers_know_every_prompt(pipeline: diffusers.FluxPipeline) -> None:
    clip, t5 = pipeline.tokenizer, pipeline.tokenizer_2
    for prompt in (
        *standins.DEMO_PROMPTS,
        *(p for split in SPLITS for p in standins.prompts(split)),
    ):
        words = len(prompt.replace(",", " ,").replace(".", " .").split())
        clip_ids, t5_ids = clip(prompt).input_ids, t5(prompt).input_ids
        assert t5.unk_token_id not in t5_ids
        assert len(t5_ids) == words + 1 <= 32
        assert clip_ids.count(clip.eos_token_id) == 1
        assert len(clip_ids) == words + 2 <= 32


def test_guidance_scale_changes_the_picture(sample: Sample) -> None:
    prompts = list(standins.DEMO_PROMPTS[:2])
    difference = (sample(prompts, 4, 1.0) - sample(prompts, 4, 5.0)).abs().amax((1, 2, 3))
    assert (difference > 0.05).all()


def test_same_seed_gives_the_same_picture(sample: Sample) -> None:
    prompts = list(standins.DEMO_PROMPTS[:1])
    assert torch.equal(sample(prompts, 2, 3.5), sample(prompts, 2, 3.5))


def test_colour_of_the_shape_follows_the_prompt(sample: Sample) -> None:
    colours = list(captions.COLOUR_RGB)
    pictures = sample([f"large plain {colour} circle center gray" for colour in colours], 12, 3.5)
    middle = pictures[:, :, 28:36, 28:36].mean((2, 3))
    palette = torch.tensor(list(captions.COLOUR_RGB.values()))
    nearest = torch.cdist(middle, palette).argmin(1)
    # One miss of eight is left to the seed; chance would give one hit.
    assert (nearest == torch.arange(len(colours))).sum() >= 7
