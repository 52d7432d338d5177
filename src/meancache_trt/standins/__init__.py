"""Small trained models with the real pipelines' classes, so that everything runs offline."""

from __future__ import annotations

from pathlib import Path

from meancache_trt.errors import InputError
from meancache_trt.standins.captions import Split, split_prompts

__all__ = ["DEMO_PROMPTS", "SIDE_PX", "Split", "path", "prompts"]

SIDE_PX = 64
"""Height and width that the stand-ins were trained at."""

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


def path(name: str = "flux") -> Path:
    """The packaged diffusers pipeline folder of a stand-in. Raises `InputError` for no such."""
    folder = Path(__file__).parent / name
    if not (folder / "model_index.json").is_file():
        known = sorted(
            index.parent.name for index in Path(__file__).parent.glob("*/model_index.json")
        )
        raise InputError(f"expected the name of a stand-in, one of {known}; found {name!r}")
    return folder


def prompts(split: Split) -> list[str]:
    """The prompts of a split, the same in every process; splits share no scene."""
    return list(split_prompts(split))
