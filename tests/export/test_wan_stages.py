"""Wan 2.2 A14B, tiny: two transformers with two guidance scales, against diffusers' pipeline."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.pipeline import identify
from meancache_trt.meancache.schedule import bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from tests.export.tiny_wan import tiny_a14b, tiny_pipeline, tiny_transformer
from tests.export.wan_subject import (
    FRAMES,
    HEIGHT,
    LATENT_TOLERANCE,
    PROMPT,
    SCALE,
    SCALE_2,
    SEED,
    STEPS,
    TEXT_TOKENS,
    WIDTH,
    Subject,
    diffusers_video,
    our_latent,
    with_scheduler,
)

# diffusers 0.42.1 hands torch tensors to np.array, which NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_schedule_rows_name_the_transformer_that_the_pipeline_would_call(
    a14b: tuple[Path, Bundle],
) -> None:
    called: list[str] = []
    pipe = tiny_a14b()
    for part in ("transformer", "transformer_2"):
        pipe.components[part].register_forward_pre_hook(
            lambda *_, part=part, **__: called.append(part)
        )
    with Pipeline(a14b[1], embedding_cache="off") as pipeline:
        subject = Subject(pipe, a14b[1], pipeline)
        schedule = subject.schedule("euler", [0, 1, 3, 4, 7])
        with_scheduler(subject, schedule)
    assert tuple(called[::2]) == schedule.transformers()  # twice each, for guidance
    assert schedule.timesteps()[2] == 875.0  # which is the first one's yet
    assert schedule.transformers() == ("transformer",) * 3 + ("transformer_2",) * 2


def test_both_scales_act(a14b: tuple[Path, Bundle]) -> None:
    with Pipeline(a14b[1], embedding_cache="off") as pipeline:
        subject = Subject(tiny_a14b(), a14b[1], pipeline)
        base = our_latent(subject, subject.schedule())
        assert (
            np.abs(base - our_latent(subject, subject.schedule(), guidance_scale=5.0)).max() > 0.01
        )
    other = {"guidance_scale_2": 4.0, "generator": torch.Generator("cpu").manual_seed(SEED)}
    found = diffusers_video(subject, **other)
    assert np.abs(diffusers_video(subject) - found).max() > 0.01


def test_identity_covers_both_transformers(a14b: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder, bundle = a14b
    assert identify(Checkpoint(folder)).digest == bundle.export.model.digest
    for part in ("transformer", "transformer_2"):
        changed = tmp_path / part
        shutil.copytree(folder, changed)
        tiny_transformer(seed=11).save_pretrained(changed / part)
        assert identify(Checkpoint(changed)).digest != bundle.export.model.digest


def test_a_second_scale_needs_a_second_transformer(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    size = stages.ExportOptions(size=(HEIGHT, WIDTH), frames=FRAMES, guidance_scale_2=3.0)
    with pytest.raises(InputError, match="has one guidance scale, found a second, 3"):
        stages.export(
            Checkpoint(tmp_path / "tiny"),
            tmp_path / "tiny.mcb",
            size,
            note=lambda _: None,
            is_forced=False,
        )


def test_a_bundle_keeps_its_second_scale(a14b: tuple[Path, Bundle]) -> None:
    folder, bundle = a14b
    options = stages.ExportOptions(
        size=(HEIGHT, WIDTH), frames=FRAMES, text_tokens=TEXT_TOKENS, guidance_scale_2=SCALE_2
    )

    def export(options: stages.ExportOptions) -> Bundle:
        return stages.export(
            Checkpoint(folder), bundle.directory, options, note=lambda _: None, is_forced=False
        )

    assert export(options).manifest == bundle.manifest
    with pytest.raises(InputError, match=r"guidance scale 3 against a guidance scale of 2\.5"):
        export(replace(options, guidance_scale_2=2.5))


def test_calibration_records_both_transformers(a14b: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder, bundle = a14b
    options = RecordOptions(
        size=(HEIGHT, WIDTH),
        frames=FRAMES,
        prompts=(PROMPT,),
        steps=STEPS,
        samples=1,
        text_tokens=TEXT_TOKENS,
        guidance_scale=SCALE,
        guidance_scale_2=SCALE_2,
    )
    recorded = stages.record_pipeline(
        Checkpoint(folder), tmp_path, options, note=lambda _: None, report=lambda *_: None
    )
    assert recorded.grid.second_stage == bundle.export.second_stage
    with Pipeline(bundle, embedding_cache="off") as pipeline:
        (found,) = pipeline.render(
            [PROMPT],
            guidance_scale=SCALE,
            seed=0,
            schedule=bake("euler", recorded.grid, range(STEPS)),
            noise="torch",
        )
    (sample,) = recorded
    final = sample.final.reshape(found.latent.shape)
    assert np.abs(found.latent - final).max() <= LATENT_TOLERANCE
