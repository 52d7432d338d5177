"""A pipeline recorded, and run again as the velocity field of its own recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meancache_trt.calibration.baking import bake_schedules
from meancache_trt.calibration.recording import scheduler_replaced
from meancache_trt.calibration.trajectories import Array, Trajectories
from meancache_trt.errors import CalibrationError, InputError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.meancache.euler_scheduler import EulerScheduler, euler_options
from meancache_trt.record import Recorder, RecordOptions
from tests.export import tiny_wan
from tests.export.families import TINY

STEPS = 5
TOLERANCE = 1e-5
"""The same float32 network at a latent that was summed in another order, of values near 5."""

SIZES = {
    "flux": (32, 48, None),
    "qwen_image": (32, 48, None),
    "z_image": (32, 48, None),
    "hunyuan_video": (32, 48, 9),
    "sd3": (32, 48, None),
    "flux2": (32, 48, None),
    "wan": (32, 48, 9),
}


@pytest.fixture(scope="module", params=SIZES)
def recorder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    TINY[request.param]().save_pretrained(folder)
    height, width, frames = SIZES[request.param]
    options = RecordOptions(
        size=(height, width), frames=frames, prompts=("a red dog", "cats"), steps=STEPS, samples=3
    )
    return Recorder(Checkpoint(folder), options)


@pytest.fixture(scope="module")
def recorded(recorder: Recorder, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    directory = tmp_path_factory.mktemp("recorded")
    return recorder.record(directory, note=lambda _: None, report=lambda *_: None)


def latents_at(recorded: Trajectories, step: int) -> Array:
    steps = np.diff(recorded.grid.array())[:step]
    moved = [t.initial + np.tensordot(steps, t.velocities[:step], 1) for t in recorded]
    return np.stack(moved).astype(np.float32)


def test_velocities_are_those_that_were_recorded(
    recorder: Recorder, recorded: Trajectories
) -> None:
    field = recorder.field(recorded)
    prompts = [sample.prompt for sample in recorded.samples]
    for step in (0, 2, STEPS - 1):
        found = field(prompts, latents_at(recorded, step), step)
        wanted = [t.velocities[step] for t in recorded]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_pictures_are_those_of_the_pipeline(recorder: Recorder, recorded: Trajectories) -> None:
    pipeline, call = recorder.pipeline, recorder.call
    first = next(iter(recorded))
    arguments = {**call.arguments(first.prompt), "output_type": "pt"}
    euler = EulerScheduler.from_config(euler_options(pipeline.scheduler))  # where it is UniPC
    with torch.inference_mode(), scheduler_replaced(pipeline, euler):
        output = pipeline(**arguments)
    made = output.frames[0].movedim(1, -1) if hasattr(output, "frames") else output.images[0]
    wanted = made if made.shape[-1] == 3 else made.movedim(0, -1)
    (found,) = recorder.field(recorded).pictures(first.final[None])
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5)  # as the latents


def test_a_pipeline_calibrates_itself(recorder: Recorder, recorded: Trajectories) -> None:
    (schedule,) = bake_schedules(recorded, [3], None, recorder.field(recorded))
    evidence = schedule.calibration
    assert evidence is not None
    assert evidence.fidelity is not None
    assert evidence.noise_floor is not None
    assert evidence.noise_floor > 80  # rounding of float32 sums; 100 would be equality


def options(**changes: object) -> RecordOptions:
    return RecordOptions(size=(64, 64), prompts=("a", "b"), **changes)  # type: ignore[arg-type]


def test_a_range_of_scales_is_sampled_evenly_with_both_ends() -> None:
    prompts = options(samples=9, guidance_range=(2.0, 6.0)).sampled()
    scales = [prompt.guidance_scale for prompt in prompts if prompt.guidance_scale is not None]
    np.testing.assert_allclose(sorted(scales), np.linspace(2, 6, 9))
    fewer = options(samples=5, guidance_range=(2.0, 6.0)).sampled()
    assert prompts[:5] == fewer  # a larger recording keeps what is there
    assert [prompt.seed for prompt in prompts] == list(range(9))


def test_one_scale_is_a_setting_and_not_a_prompts() -> None:
    assert all(p.guidance_scale is None for p in options(guidance_scale=3.0).sampled())


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_range": (6.0, 2.0)},
        {"guidance_range": (2.0, 6.0), "guidance_scale": 3.5},
        {"guidance_range": (2.0, 6.0), "samples": 1},
    ],
)
def test_a_range_that_cannot_be_sampled_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="the lower one first, at least two samples"):
        options(**changes)


def test_what_the_model_cannot_take_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    TINY["qwen_image"]().save_pretrained(folder)
    odd = RecordOptions(size=(33, 48), prompts=("a",))
    with pytest.raises(InputError, match="33"):
        Recorder(Checkpoint(folder), odd)
    below = RecordOptions(size=(32, 48), prompts=("a",), guidance_range=(0.5, 4.0))
    with pytest.raises(InputError, match=r"at least 1, .*found 0\.5"):
        Recorder(Checkpoint(folder), below)
    second = RecordOptions(size=(32, 48), prompts=("a",), guidance_scale_2=3.0)
    with pytest.raises(InputError, match="one transformer has one guidance scale, found a second"):
        Recorder(Checkpoint(folder), second)


@pytest.mark.parametrize("first", [{"guidance_scale": 1.0}, {"guidance_range": (1.0, 6.0)}])
def test_a_second_scale_that_the_pipeline_would_leave_out_is_refused(
    first: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    tiny_wan.tiny_a14b().save_pretrained(folder)
    options = RecordOptions(size=(32, 48), frames=5, prompts=("a",), guidance_scale_2=3.0, **first)
    with pytest.raises(InputError, match="a first guidance scale of 1 has the pipeline leave out"):
        Recorder(Checkpoint(folder), options)


def test_a_scale_out_of_range_is_refused_before_the_work() -> None:
    with pytest.raises(InputError, match="0 to 1000, found -1"):
        options(guidance_range=(-1.0, 3.0))
    with pytest.raises(CalibrationError, match="1 to 50 evaluations on this grid, found 51"):
        options(budgets=(51,))


def test_recorded_scales_differ_within_the_range(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    TINY["qwen_image"]().save_pretrained(folder)
    ranged = RecordOptions(
        size=(32, 48), prompts=("a red dog",), steps=3, samples=2, guidance_range=(2.0, 6.0)
    )
    recorder = Recorder(Checkpoint(folder), ranged)
    recorded = recorder.record(tmp_path / "r", note=lambda _: None, report=lambda *_: None)
    assert recorded.settings.guidance_range == (2.0, 6.0)
    assert recorded.settings.guidance_scale is None
    found = recorder.field(recorded)(
        [sample.prompt for sample in recorded.samples], latents_at(recorded, 1), 1
    )
    wanted = [t.velocities[1] for t in recorded]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    low, high = (sample.prompt for sample in recorded.samples)
    assert (low.guidance_scale, high.guidance_scale) == (2.0, 6.0)
