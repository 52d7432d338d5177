"""A diffusers pipeline as a renderer: what it makes is what the pipeline makes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from meancache_trt.calibration.trajectories import Prompt
from meancache_trt.errors import ScheduleError
from meancache_trt.evaluate.torch_renderer import TorchRenderer, limited_threads
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.meancache.schedule import Evidence, ModelReference, Schedule, bake
from meancache_trt.meancache.sigmas import SecondStage
from meancache_trt.record import Recorder, RecordOptions
from tests.export.families import TINY

STEPS = 4
PROMPT = Prompt("a red fox", 7)


@pytest.fixture(scope="module", params=["flux", "hunyuan_video"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    TINY[request.param]().save_pretrained(folder)
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def recorder(checkpoint: Checkpoint) -> Recorder:
    frames = 5 if checkpoint.path.name == "hunyuan_video" else None
    options = RecordOptions(size=(32, 48), frames=frames, prompts=("a",), steps=STEPS)
    return Recorder(checkpoint, options)


@pytest.fixture
def renderer(checkpoint: Checkpoint, recorder: Recorder) -> TorchRenderer:
    return TorchRenderer(checkpoint, recorder.pipeline, recorder.call)


def every_step(renderer: TorchRenderer) -> Schedule:
    return bake("euler", renderer.grid(STEPS), range(STEPS))


def test_all_steps_are_the_pipelines_own_pictures(
    recorder: Recorder, renderer: TorchRenderer
) -> None:
    made = renderer.open(every_step(renderer))([PROMPT])
    latent, pictures = (
        recorder.pipeline(**{**recorder.call.arguments(PROMPT), "output_type": kind})[0]
        for kind in ("latent", "np")
    )
    assert np.array_equal(made.latents, latent.numpy())
    assert np.array_equal(made.pictures, pictures)
    assert made.loop_ms > 0


def test_the_pipeline_has_its_own_scheduler_again(
    recorder: Recorder, renderer: TorchRenderer
) -> None:
    before = recorder.pipeline.scheduler
    renderer.open(every_step(renderer))([PROMPT])
    assert recorder.pipeline.scheduler is before


def test_a_schedule_of_fewer_steps_runs_on_a_grid_of_its_own(renderer: TorchRenderer) -> None:
    full = renderer.open(every_step(renderer))([PROMPT])
    fewer = renderer.open(bake("euler", renderer.grid(2), range(2)))([PROMPT])
    assert fewer.pictures.shape == full.pictures.shape
    assert not np.array_equal(fewer.latents, full.latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 9.0}, "calibrated for guidance scale 9.0"),
        ({"model": ModelReference(name="other", digest="00")}, "calibrated on 'other'"),
    ],
)
def test_a_schedule_of_something_else_is_refused(
    renderer: TorchRenderer, changes: dict[str, object], message: str
) -> None:
    evidence = Evidence(samples=1, seconds=0.0)
    schedule = msgspec.structs.replace(every_step(renderer), calibration=evidence, **changes)
    with pytest.raises(ScheduleError, match=message):
        renderer.open(schedule)


def test_a_schedule_of_another_second_guidance_scale_is_refused(renderer: TorchRenderer) -> None:
    """The pipeline is called with none, so that the first one's acts in both of its stages."""

    def of(scale: float | None) -> Schedule:
        stage = SecondStage(boundary_timestep=875.0, guidance_scale=scale)
        grid = msgspec.structs.replace(renderer.grid(STEPS), second_stage=stage)
        return bake("euler", grid, range(STEPS))

    renderer.open(of(None))
    with pytest.raises(ScheduleError, match=r"guidance scale 3, this pipeline .* scale None"):
        renderer.open(of(3.0))


def test_the_setup_names_what_rendered(renderer: TorchRenderer) -> None:
    setup = renderer.setup(STEPS, 8)
    assert (setup.height, setup.width, setup.steps, setup.reference_steps) == (32, 48, STEPS, 8)
    assert setup.bundle_id is None
    assert setup.renderer.startswith("diffusers ")
    assert (setup.frames, setup.frames_per_second) in {(None, None), (5, 24.0)}


def test_threads_are_limited_for_a_while() -> None:
    before = torch.get_num_threads()
    with limited_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with limited_threads(0):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
