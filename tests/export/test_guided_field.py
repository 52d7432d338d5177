"""Under classifier-free guidance the engine's velocity field is the guided one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from meancache_trt import build as stages
from meancache_trt.bundle import create_bundle
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.engine_field import engine_field
from meancache_trt.export import export_components
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from tests.export.tiny_qwen_image import tiny_pipeline

HEIGHT, WIDTH, TEXT_TOKENS, STEPS, STEP = 32, 48, 160, 4, 2

TOLERANCE = 2e-5
"""Float32 sums in another order; the bundle's own tests have the same over 8 evaluations."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen") / "tiny-qwen-image"
    tiny_pipeline().save_pretrained(path)
    return path


def test_velocities_are_the_guided_ones_that_were_recorded(folder: Path) -> None:
    options = RecordOptions(
        size=(HEIGHT, WIDTH), prompts=("a red dog", "two cats"), steps=STEPS, samples=2
    )
    recorded = stages.record_pipeline(
        Checkpoint(folder),
        folder.parent / "recorded",
        options,
        note=lambda _: None,
        report=lambda *_: None,
    )
    # short texts: the length that they are cut to, which the tiny bundle has less of, is no matter
    settings = msgspec.structs.replace(recorded.settings, text_tokens=TEXT_TOKENS)
    trajectories = Trajectories(recorded.directory, settings, recorded.samples)
    bundle = create_bundle(
        folder.parent / "qwen.mcb",
        lambda target: export_components(
            folder,
            target,
            height=HEIGHT,
            width=WIDTH,
            text_tokens=TEXT_TOKENS,
            check_parity=False,
        ),
        {},
    )
    steps = np.diff(recorded.grid.array())[:STEP]
    moved = [t.initial + np.tensordot(steps, t.velocities[:STEP], 1) for t in recorded]
    latents = np.stack(moved).astype(np.float32)
    wanted = np.stack([t.velocities[STEP] for t in recorded])
    prompts = [sample.prompt for sample in recorded.samples]
    with Pipeline(bundle, threads=1) as pipeline:
        with engine_field(pipeline, trajectories, batch=2) as field:
            both = field(prompts, latents, STEP)
        with engine_field(pipeline, trajectories) as field:
            single = field(prompts[1:], latents[1:], STEP)
    np.testing.assert_allclose(both, wanted, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(single, wanted[1:], rtol=0, atol=TOLERANCE)
