"""The model that everything runs on: one diffusers pipeline, its call, prompts and noise."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scripts.rivals.work import probing

from meancache_trt import build as stages
from meancache_trt.calibration.recording import PipelineCall, scheduler_replaced
from meancache_trt.calibration.trajectories import Prompt
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.record import Recorder, RecordOptions

STEPS = 50


@dataclass(frozen=True)
class Run:
    """One picture, float in [0, 1], and what its denoising loop took.

    `calls` of the transformer (guidance may make two a step), and `flops`, 0 if not counted.
    """

    pixels: NDArray[np.float32]
    calls: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Subject:
    """A pipeline in float32 on the CPU with the call that calibration records."""

    name: str
    checkpoint: Checkpoint
    pipeline: Any
    call: PipelineCall
    prompts: tuple[Prompt, ...]

    def run(self, prompt: Prompt, steps: int = STEPS, *, is_counting: bool = True) -> Run:
        """Render one prompt as the pipeline stands."""
        arguments = replace(self.call, steps=steps).arguments(prompt)
        with probing(self.pipeline.transformer, is_counting=is_counting) as probe:
            pictures = self.pipeline(
                **{**arguments, "output_type": "np"}, callback_on_step_end=probe.mark
            )[0]
        return Run(np.asarray(pictures[0]), probe.calls, probe.flops, probe.seconds)

    def scheduler(self, scheduler: Any) -> contextlib.AbstractContextManager[None]:
        """Another scheduler in the pipeline for the length of the `with`."""
        return scheduler_replaced(self.pipeline, scheduler)


@contextlib.contextmanager
def own_transformer(subject: Subject) -> Iterator[None]:
    """A copy of the transformer in the pipeline for the length of the `with`.

    cache-dit's patch of a FLUX transformer stays when it is disabled, and breaks diffusers' caches.
    """
    original = subject.pipeline.transformer
    subject.pipeline.transformer = copy.deepcopy(original)
    try:
        yield
    finally:
        subject.pipeline.transformer = original


def load_subject(name: str, texts: list[str], size: tuple[int, int]) -> Subject:
    """`standin/NAME` or a diffusers folder, to be called with `texts`; picture i has seed 1000 + i.

    The call is the one that calibration records. Raises `MeanCacheError` where there is no such
    model.
    """
    checkpoint = stages.find_model(name)
    recorder = Recorder(checkpoint, RecordOptions(size=size, prompts=tuple(texts), steps=STEPS))
    prompts = tuple(Prompt(text, seed=1000 + index) for index, text in enumerate(texts))
    return Subject(name, checkpoint, recorder.pipeline, recorder.call, prompts)
