"""Tiny random pipelines of every family, as the benchmark runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.rivals.subject import STEPS, Subject

from meancache_trt.calibration.recording import PipelineCall
from meancache_trt.calibration.trajectories import Prompt
from meancache_trt.export.checkpoint import Checkpoint
from tests.export.families import TEXT_TOKENS, TINY

CALLS: Mapping[str, dict[str, Any]] = {
    "flux": {"guidance_scale": 3.5, "options": {"max_sequence_length": TEXT_TOKENS}},
    "qwen_image": {
        "guidance_scale": 4.0,
        "guidance_argument": "true_cfg_scale",
        "options": {"max_sequence_length": TEXT_TOKENS, "negative_prompt": ""},
    },
    "hunyuan_video": {
        "frames": 5,
        "guidance_scale": 6.0,
        "options": {"max_sequence_length": TEXT_TOKENS},
    },
}


def subject(family: str) -> Subject:
    pipeline = TINY[family]()
    pipeline.set_progress_bar_config(disable=True)
    call = PipelineCall(steps=STEPS, height=32, width=48, **CALLS[family])
    prompts = (Prompt("two cats on a mat", seed=1), Prompt("a dog", seed=2))
    return Subject(family, Checkpoint(Path("none")), pipeline, call, prompts)
