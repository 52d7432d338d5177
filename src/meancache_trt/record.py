"""A checkpoint's own diffusers pipeline, recorded over all its steps, and run again for fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meancache_trt.calibration.baking import check_budgets
from meancache_trt.calibration.trajectories import Prompt, Trajectories, discard, record
from meancache_trt.calibration.velocity_field import BATCH_VALUES, VelocityField
from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint, check_libraries
from meancache_trt.export.family import (
    Configs,
    Family,
    Size,
    check_size,
    default_frames,
    resolution,
    second_stage,
)
from meancache_trt.export.pipeline import identify
from meancache_trt.export.registry import detect
from meancache_trt.manifest import Resolution, check_guidance
from meancache_trt.meancache.schedule import ModelReference, check_guidance_scale

if TYPE_CHECKING:
    import torch

    from meancache_trt.calibration.recording import PipelineCall

Note = Callable[[str], None]
Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What is recorded for calibration, at `size` (height, width) in pixels.

    `guidance_scale`, `text_tokens` and `frames` of a video None mean the model's defaults, and
    `guidance_scale_2`, which is that of a second stage, means the first one's. With
    `guidance_range` the samples' scales are spread over it instead. Sample i has prompt i (they
    repeat where there are fewer than `samples`) and seed i. `budgets` are what will be baked from
    it, so that one out of range is refused before the work.
    """

    size: tuple[int, int]
    frames: int | None = None
    prompts: tuple[str, ...]
    steps: int = 50
    samples: int = 16
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance_range: tuple[float, float] | None = None
    text_tokens: int | None = None
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 1:
            raise InputError(
                f"calibration records at least one sample of one step, found {self.samples} of "
                f"{self.steps}; give --samples and --steps of 1 or more"
            )
        for scale in (self.guidance_scale, self.guidance_scale_2):
            check_guidance_scale(scale)
        self._check_range()
        check_budgets(self.budgets, self.steps)

    def _check_range(self) -> None:
        if self.guidance_range is None:
            return
        low, high = self.guidance_range
        for scale in (low, high):
            check_guidance_scale(scale)
        if not low < high or self.guidance_scale is not None or self.samples < 2:
            raise InputError(
                "a range of guidance scales has the lower one first, at least two samples and no "
                f"single scale beside it, found {low:g} to {high:g}, {self.samples} samples and "
                f"{self.guidance_scale}"
            )

    def sampled(self) -> list[Prompt]:
        """Every sample's prompt, seed and, from a range, scale."""
        texts = [self.prompts[index % len(self.prompts)] for index in range(self.samples)]
        if self.guidance_range is None:
            return [Prompt(text, seed=index) for index, text in enumerate(texts)]
        low, high = self.guidance_range
        return [
            Prompt(text, seed=index, guidance_scale=round(low + (high - low) * _spread(index), 6))
            for index, text in enumerate(texts)
        ]


def _spread(index: int) -> float:
    """Where sample `index` lies in [0, 1]: 0, 1, 1/2, 1/4, 3/4, 1/8 …, so that more samples add to
    those that are there.
    """
    if index < 2:
        return float(index)
    digits = f"{index - 1:b}"[::-1]
    return float(int(digits, 2) / 2 ** len(digits))


class Recorder:
    """The diffusers pipeline of a checkpoint, in float32 on the CPU; loaded at its first use."""

    def __init__(self, checkpoint: Checkpoint, options: RecordOptions) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._family = detect(checkpoint.path)
        self._configs = checkpoint.model_configs(self._family.text_components)
        check_size(self._family, self._configs, self._size)
        guidance = self._family.guidance(self._configs)
        for scale in (options.guidance_scale, *(options.guidance_range or ())):
            check_guidance(guidance, scale)
        self._check_second_scale(guidance.default_scale)
        self._second_stage = second_stage(self._family, self._configs, options.guidance_scale_2)

    def _check_second_scale(self, default: float | None) -> None:
        options = self._options
        first = options.guidance_scale if options.guidance_scale is not None else default
        least = options.guidance_range[0] if options.guidance_range is not None else first
        if options.guidance_scale_2 is not None and least is not None and least <= 1:
            raise InputError(
                f"a first guidance scale of {least:g} has the pipeline leave out the second one, "
                f"{options.guidance_scale_2:g}, too; record with a first scale above 1, or without "
                "a second"
            )

    def record(
        self, directory: Path, *, note: Note, report: Report, is_forced: bool = False
    ) -> Trajectories:
        """Record the pipeline over all steps, resuming if begun.

        `is_forced` drops what was recorded in `directory` before. Raises `CalibrationError` where
        `directory` was recorded with other settings or a velocity is not finite.
        """
        from meancache_trt.calibration.recording import (  # noqa: PLC0415  (imports torch)
            PipelineSampler,
        )
        from meancache_trt.export.lora_merge import merge  # noqa: PLC0415  (imports torch)

        prompts = self._options.sampled()
        note(f"calibrate: recording {len(prompts)} samples of {self._options.steps} steps")
        if self._checkpoint.loras:
            merge(self._checkpoint, "transformer", note)  # refused before anything is lost
        if is_forced:
            discard(directory)
        sampler, model = PipelineSampler(self.pipeline, self.call), identify(self._checkpoint)
        settings = sampler.settings(
            prompts[0],
            family=self._family.name,
            model=ModelReference(name=model.name, digest=model.digest),
            text_tokens=self._text_tokens,
            guidance_range=self._options.guidance_range,
            second_stage=self._second_stage,
        )
        return record(directory, settings, sampler, prompts, report)

    def field(self, trajectories: Trajectories) -> VelocityField:
        """The pipeline as the velocity field of what it recorded."""
        from meancache_trt.calibration.pipeline_field import (  # noqa: PLC0415  (imports torch)
            PipelineField,
        )

        size = self._resolution
        wrapper, vae = self._family.wrapper(), self.pipeline.vae
        if self._family.tiling is not None and math.prod(size.latent_shape) > BATCH_VALUES:
            vae.enable_tiling()  # a whole large video would not fit in memory

        def decode(latent: torch.Tensor) -> torch.Tensor:
            shaped = latent.reshape(1, *size.decode_shape)
            return wrapper.reference_image(vae, shaped, size.symbols)

        def argument(latent: torch.Tensor) -> torch.Tensor:
            given: torch.Tensor = self._family.latents_argument(latent, size)
            return given

        return PipelineField(
            self.pipeline, self.call, tuple(size.latent_shape), decode, len(trajectories), argument
        )

    @cached_property
    def pipeline(self) -> Any:
        """The diffusers pipeline itself, with the checkpoint's LoRAs merged."""
        from meancache_trt.calibration.recording import (  # noqa: PLC0415  (imports torch)
            load_pipeline,
        )
        from meancache_trt.export.lora_merge import merge_into  # noqa: PLC0415  (imports torch)

        check_libraries(self._checkpoint)
        pipeline = load_pipeline(self._checkpoint.path)
        merge_into(pipeline.transformer, self._checkpoint, "transformer")
        return pipeline

    @cached_property
    def _text_tokens(self) -> int:
        return self._options.text_tokens or self._family.default_text_tokens(self._configs)

    @property
    def _mu_tokens(self) -> int | None:
        return None if self._family.mu == "line" else self._resolution.symbols["image_tokens"]

    @property
    def _resolution(self) -> Resolution:
        return resolution(self._family, self._configs, self._size)

    @property
    def _size(self) -> Size:
        height, width = self._options.size
        return Size(height, width, self._text_tokens, self._frames)

    @property
    def _frames(self) -> int | None:
        frames = self._options.frames
        return default_frames(self._family, self._configs) if frames is None else frames

    @property
    def call(self) -> PipelineCall:
        """How the pipeline is called for a sample."""
        from meancache_trt.calibration.recording import (  # noqa: PLC0415  (imports torch)
            PipelineCall,
        )

        return PipelineCall(
            steps=self._options.steps,
            height=self._options.size[0],
            width=self._options.size[1],
            frames=self._frames,
            guidance_scale=self._guidance_scale,
            guidance_argument=self._family.guidance_argument,
            image_tokens=self._mu_tokens,
            options=_call_options(
                self._family, self._configs, self._text_tokens, self._options.guidance_scale_2
            ),
        )

    @property
    def _guidance_scale(self) -> float | None:
        if self._options.guidance_range is not None:
            return None  # each prompt has its own
        scale = self._options.guidance_scale
        return self._family.guidance(self._configs).default_scale if scale is None else scale


def _call_options(
    family: Family, configs: Configs, text_tokens: int, guidance_scale_2: float | None
) -> dict[str, str | float]:
    """Further arguments, with which the diffusers pipeline does what a render does by default."""
    options: dict[str, str | float] = {}
    if family.text_tokens_argument:
        options[family.text_tokens_argument] = text_tokens
    if family.guidance(configs).is_classifier_free:
        options["negative_prompt"] = ""  # given none, diffusers leaves guidance out
    if family.guidance(configs).rule == "none":
        options[family.guidance_argument] = 0.0  # given none, ZImagePipeline guides
    if guidance_scale_2 is not None:
        options["guidance_scale_2"] = guidance_scale_2
    return options
