"""Small trained models with the real pipelines' classes, so that everything runs offline."""

from __future__ import annotations

from pathlib import Path

from meancache_trt.errors import InputError
from meancache_trt.standins import captions, video_captions
from meancache_trt.standins.captions import Split

__all__ = [
    "DEMO_PROMPTS",
    "DEMO_VIDEO_PROMPTS",
    "Split",
    "lora_path",
    "names",
    "path",
    "prompts",
]

DEMO_PROMPTS = (
    "large striped yellow star center navy",
    "a small plain red heart on the left, on a mint background",
    "a large dotted purple ring in the middle, against a gray background",
    "large plain white moon right black",
    "a big orange triangle with stripes on the left side, on a brown background",
    "small dotted green square right pink",
    "one huge plain cyan cross, centered, in front of a black background",
    "a tiny blue circle on the right, with a pink background",
)

DEMO_VIDEO_PROMPTS = (
    "large plain yellow cross center navy falling",
    "a small red circle on the left, on a mint background, rising",
    "a large purple ring in the middle, against a gray background, standing still",
    "large plain white triangle right black rising",
    "a big orange square, moving down, on the left side, on a brown background",
    "small plain green cross right pink still",
    "one huge cyan circle, centered, in front of a black background, going up",
    "a tiny blue triangle on the right, falling, with a pink background",
)

_WORLDS = {"flux": captions, "hunyuan_video": video_captions, "qwen_image": captions}


def path(name: str = "flux") -> Path:
    """The packaged diffusers pipeline folder of a stand-in. Raises `InputError` for no such."""
    folder = Path(__file__).parent / name
    if not (folder / "model_index.json").is_file():
        raise InputError(f"expected the name of a stand-in, one of {names()}; found {name!r}")
    return folder


def lora_path(name: str) -> Path:
    """The packaged LoRA of a stand-in, such as flux_magenta. Raises `InputError` for no such."""
    folder = Path(__file__).parent / "loras"
    known = sorted(file.stem for file in folder.glob("*.safetensors"))
    if name not in known:
        raise InputError(f"expected the name of a stand-in's LoRA, one of {known}; found {name!r}")
    return folder / f"{name}.safetensors"


def names() -> list[str]:
    """The stand-ins that are packaged, sorted."""
    return sorted(index.parent.name for index in Path(__file__).parent.glob("*/model_index.json"))


def prompts(split: Split, name: str = "flux") -> list[str]:
    """The prompts of a split of a stand-in's, the same in every process; splits share no scene.

    Raises `InputError` for no such stand-in.
    """
    if name not in _WORLDS:
        raise InputError(f"expected the name of a stand-in, one of {list(_WORLDS)}; found {name!r}")
    return list(_WORLDS[name].split_prompts(split))
