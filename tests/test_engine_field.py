"""The engine of a bundle as a velocity field: what it computes is what diffusers recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import BakeOptions
from meancache_trt.calibration.trajectories import Array, Trajectories
from meancache_trt.engine_field import engine_field
from meancache_trt.errors import BundleError, CalibrationError, ScheduleError
from meancache_trt.meancache.schedule import ModelReference
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline

STEPS = 6
PROMPTS = ("large plain red circle left gray", "small striped blue star right white")

TOLERANCE = 1e-4
"""Float32 sums in another order, of values near 5; measured 1.3e-5."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    checkpoint = stages.find_model("standin/flux")
    options = RecordOptions(size=(64, 64), prompts=PROMPTS, steps=STEPS, samples=4)
    directory = tmp_path_factory.mktemp("recorded")
    return stages.record_pipeline(
        checkpoint, directory, options, note=lambda _: None, report=lambda *_: None
    )


def latents_at(recorded: Trajectories, step: int) -> Array:
    steps = np.diff(recorded.grid.array())[:step]
    moved = [t.initial + np.tensordot(steps, t.velocities[:step], 1) for t in recorded]
    return np.stack(moved).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_velocities_are_those_that_diffusers_recorded(
    pipeline: Pipeline, recorded: Trajectories, batch: int
) -> None:
    prompts = [sample.prompt for sample in recorded.samples]
    with engine_field(pipeline, recorded, batch=batch) as field:
        for step in (0, 3, STEPS - 1):
            latents = latents_at(recorded, step)
            for first in range(0, 4, batch):
                chosen = slice(first, first + batch)
                found = field(prompts[chosen], latents[chosen], step)
                wanted = [t.velocities[step] for t in recorded][chosen]
                np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_each_distinct_prompt_is_encoded_once(
    pipeline: Pipeline, recorded: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []

    def encode(prompts: list[str]) -> object:
        encoded.extend(prompts)
        return Pipeline.encode(pipeline, prompts)

    monkeypatch.setattr(pipeline, "encode", encode)
    prompts = [sample.prompt for sample in recorded.samples]
    with engine_field(pipeline, recorded, batch=2) as field:
        for first in (0, 2):
            field(prompts[first : first + 2], latents_at(recorded, 1)[:2], 1)
    assert sorted(encoded) == sorted(PROMPTS)


OTHERS = {
    "text tokens": ({"text_tokens": 99}, CalibrationError, "99 text tokens, this bundle takes"),
    "precision": ({"precision": "float8"}, ScheduleError, "calibrated in float8"),
    "family": ({"family": "qwen_image"}, ScheduleError, "for the family 'qwen_image'"),
    "model": (
        {"model": ModelReference(name="other", digest="00")},
        ScheduleError,
        "calibrated on 'other'",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_recordings_of_something_else_are_refused(
    pipeline: Pipeline, recorded: Trajectories, name: str
) -> None:
    change, error, message = OTHERS[name]
    settings = msgspec.structs.replace(recorded.settings, **change)
    others = Trajectories(recorded.directory, settings, recorded.samples)
    with pytest.raises(error, match=message), engine_field(pipeline, others):
        pass


def test_recordings_of_a_near_precision_are_taken(
    pipeline: Pipeline, recorded: Trajectories
) -> None:
    settings = msgspec.structs.replace(recorded.settings, precision="bfloat16")
    others = Trajectories(recorded.directory, settings, recorded.samples)
    prompts = [sample.prompt for sample in recorded.samples][:1]
    found = []
    for each in (recorded, others):
        with engine_field(pipeline, each) as field:
            found.append(field(prompts, latents_at(recorded, 1)[:1], 1))
    np.testing.assert_array_equal(*found)


def test_a_size_that_the_bundle_lacks_is_refused(
    pipeline: Pipeline, recorded: Trajectories
) -> None:
    grid = msgspec.structs.replace(recorded.grid, height=128)
    settings = msgspec.structs.replace(recorded.settings, grid=grid)
    others = Trajectories(recorded.directory, settings, recorded.samples)
    with (
        pytest.raises(BundleError, match="this bundle renders 64x64"),
        engine_field(pipeline, others),
    ):
        pass


def test_each_sample_has_the_guidance_scale_of_its_prompt(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    options = RecordOptions(
        size=(64, 64), prompts=PROMPTS, steps=STEPS, samples=3, guidance_range=(2.0, 6.0)
    )
    ranged = stages.record_pipeline(
        stages.find_model("standin/flux"),
        tmp_path / "ranged",
        options,
        note=lambda _: None,
        report=lambda *_: None,
    )
    prompts = [sample.prompt for sample in ranged.samples]
    assert len({prompt.guidance_scale for prompt in prompts}) == 3
    with engine_field(pipeline, ranged, batch=3) as field:
        found = field(prompts, latents_at(ranged, 2), 2)
    wanted = [t.velocities[2] for t in ranged]
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_pictures_are_those_that_the_engine_renders(
    pipeline: Pipeline, recorded: Trajectories
) -> None:
    prompt = recorded.samples[0].prompt
    (rendered,) = pipeline.render(
        [prompt.text], seed=prompt.seed, schedule="full", guidance_scale=3.5, noise="torch"
    )
    with engine_field(pipeline, recorded, batch=4) as field:
        alone = field.pictures(rendered.latent.reshape(1, -1))
        three = field.pictures(np.stack([rendered.latent.reshape(-1)] * 3))
    assert (alone[0] == rendered.pixels).all()
    np.testing.assert_allclose(
        three[2], rendered.pixels, atol=1e-5
    )  # another batch of convolutions


@pytest.fixture
def fitted(bundle: Path, recorded: Trajectories) -> Iterator[Pipeline]:
    opened = Bundle.open(bundle)
    stages.bake_into(opened, recorded, [3], BakeOptions(method="fitted"), threads=1)
    with Pipeline(Bundle.open(bundle)) as pipeline:
        yield pipeline


def test_a_fitted_schedule_is_baked_into_its_bundle_and_renders_better_than_euler(
    fitted: Pipeline, recorded: Trajectories
) -> None:
    schedule = fitted.bundle.schedule("b3")
    assert (schedule.method, schedule.budget, schedule.guidance_scale) == ("fitted", 3, 3.5)
    prompt = recorded.samples[0].prompt
    ends = {}
    for name in ("full", "b3"):
        (picture,) = fitted.render(
            [prompt.text], seed=prompt.seed, schedule=name, guidance_scale=3.5, noise="torch"
        )
        ends[name] = picture.latent.reshape(-1)
    first = next(iter(recorded))
    np.testing.assert_allclose(ends["full"], first.final, atol=1e-3)  # the recording itself
    error = np.linalg.norm(ends["b3"] - first.final)
    steps, nodes = np.diff(schedule.sigmas()), latents_at(recorded, 0)[:1]
    with engine_field(fitted, recorded) as field:
        for node, width in zip(schedule.nodes, steps, strict=True):
            nodes = (nodes + width * field([prompt], nodes, node)).astype(np.float32)
    assert error < np.linalg.norm(nodes[0] - first.final)
