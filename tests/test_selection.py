"""Schedules of several resolutions, where each resolution has a grid of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.errors import BundleError, InputError, ScheduleError
from meancache_trt.manifest import Resolution
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.files import write_json
from meancache_trt.meancache.schedule import Schedule, bake, save_schedule
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.measured import measure
from meancache_trt.render import Pipeline
from tests.test_resolutions import resolutions

STEPS = 12
SIZES = ("64x64", "128x64", "128x128")


@pytest.fixture(scope="module")
def dynamic(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three resolutions whose scheduler shifts by the number of image tokens."""
    path = tmp_path_factory.mktemp("dynamic") / "dynamic.mcb"
    shutil.copytree(shared_bundle, path)
    manifest = Bundle.open(path).manifest
    export = msgspec.structs.replace(
        manifest.export,
        scheduler={**manifest.export.scheduler, "use_dynamic_shifting": True},
        resolutions=resolutions(*SIZES),
    )
    changed = msgspec.structs.replace(manifest, export=export, additions={})
    write_json(path / MANIFEST, changed.sealed())
    return path


@pytest.fixture
def pipeline(dynamic: Path, tmp_path: Path) -> Iterator[Pipeline]:
    own = tmp_path / "own.mcb"
    shutil.copytree(dynamic, own)
    with Pipeline(Bundle.open(own)) as opened:
        yield opened


def calibrated(
    pipeline: Pipeline, resolution: Resolution, budget: int, name: str | None = None
) -> Schedule:
    """A schedule as calibration at this resolution makes them."""
    return bake(
        "euler",
        pipeline.grid(STEPS, resolution),
        range(budget),
        name=name or f"b{budget}-{resolution.size}",
        calibration=Evidence(samples=1, seconds=0.0),
    )


def add(pipeline: Pipeline, *schedules: Schedule) -> None:
    for schedule in schedules:
        pipeline.bundle.add_schedule(schedule)


def test_each_resolution_has_a_grid_of_its_own(pipeline: Pipeline) -> None:
    sigmas = {pipeline.grid(STEPS, each).sigmas for each in pipeline.bundle.export.resolutions}
    assert len(sigmas) == 3
    assert pipeline.grid(STEPS).describe().endswith("64x64")


@pytest.mark.parametrize("wanted", [3, "3", None])
def test_the_schedule_that_fits_the_resolution_is_chosen(
    pipeline: Pipeline, wanted: str | int | None
) -> None:
    listed = pipeline.bundle.export.resolutions
    add(pipeline, *(calibrated(pipeline, each, 3) for each in listed))
    for each in listed:
        found = pipeline.schedule(wanted, resolution=each)
        assert found.name == f"b3-{each.size}"
        assert found.grid == pipeline.grid(STEPS, each)


def test_the_largest_is_that_of_the_resolution(pipeline: Pipeline) -> None:
    square, wide, _ = pipeline.bundle.export.resolutions
    add(
        pipeline,
        *(calibrated(pipeline, square, budget) for budget in (4, 9)),
        *(calibrated(pipeline, wide, budget) for budget in (2, 5)),
    )
    assert pipeline.schedule().budget == 9
    assert pipeline.schedule(resolution=wide).budget == 5


@pytest.mark.parametrize("wanted", [3, None, "b3-64x64"])
def test_a_resolution_without_a_schedule_is_told_both_grids_and_how_to_make_one(
    pipeline: Pipeline, wanted: str | int | None
) -> None:
    square, wide, large = pipeline.bundle.export.resolutions
    add(pipeline, calibrated(pipeline, square, 3), calibrated(pipeline, wide, 2))
    with pytest.raises(ScheduleError) as failure:
        pipeline.schedule(wanted, resolution=large)
    message = str(failure.value)
    assert "12 steps, mu 0.4675, 64x64 against 12 steps, mu 0.5, 128x128" in message
    assert "meancache-trt calibrate MODEL -o DIRECTORY --resolution 128x128" in message
    assert f"--budget 3 --bundle {pipeline.bundle.directory}" in message


def test_a_file_of_another_resolution_is_refused_in_the_same_way(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    square, wide, _ = pipeline.bundle.export.resolutions
    save_schedule(calibrated(pipeline, square, 3), tmp_path / "b3.json")
    with pytest.raises(ScheduleError, match=r"another grid.*--resolution 128x64"):
        pipeline.schedule(tmp_path / "b3.json", resolution=wide)
    assert pipeline.schedule(tmp_path / "b3.json").budget == 3


def test_analytic_schedules_are_folded_for_each_resolution(pipeline: Pipeline) -> None:
    add(pipeline, bake("official", pipeline.grid(STEPS), [0, 1, 4], [1, 1], name="mine"))
    for each in pipeline.bundle.export.resolutions:
        grid = pipeline.grid(STEPS, each)
        expected = bake("official", grid, [0, 1, 4], [1, 1], name="mine")
        for wanted in ("mine", 3, None):
            assert pipeline.schedule(wanted, resolution=each) == expected


def test_a_schedule_of_other_steps_is_folded_with_the_mu_of_its_own(
    shared_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "empirical.mcb"
    shutil.copytree(shared_bundle, path)
    manifest = Bundle.open(path).manifest
    scheduler = {**manifest.export.scheduler, "use_dynamic_shifting": True}
    export = msgspec.structs.replace(manifest.export, scheduler=scheduler, mu="empirical")
    write_json(path / MANIFEST, msgspec.structs.replace(manifest, export=export).sealed())
    with Pipeline(Bundle.open(path)) as pipeline:
        tokens = pipeline.resolution().symbols["image_tokens"]
        for steps in (STEPS, 28):
            own = make_grid(steps, mu=compute_empirical_mu(tokens, steps))
            found = pipeline.schedule(bake("euler", make_grid(steps, mu=0.7), range(0, STEPS, 3)))
            assert found.grid.sigmas == own.sigmas
            assert found.weights == bake("euler", own, range(0, STEPS, 3)).weights


def test_an_uncalibrated_schedule_never_stands_in_for_a_calibrated_one(pipeline: Pipeline) -> None:
    square, wide, _ = pipeline.bundle.export.resolutions
    analytic = bake("euler", pipeline.grid(STEPS), [0, 2, 4], name="analytic")
    add(pipeline, calibrated(pipeline, square, 3), analytic)
    with pytest.raises(ScheduleError, match="calibrated on another grid"):
        pipeline.schedule(3, resolution=wide)
    assert pipeline.schedule("analytic", resolution=wide).budget == 3


def test_several_of_one_budget_and_resolution_are_never_a_guess(pipeline: Pipeline) -> None:
    square, wide, _ = pipeline.bundle.export.resolutions
    add(pipeline, *(calibrated(pipeline, square, 3, name) for name in ("a", "b")))
    add(pipeline, calibrated(pipeline, wide, 3))
    with pytest.raises(BundleError, match="several schedules of 3 evaluations: a, b; ask"):
        pipeline.schedule(3)
    assert pipeline.schedule(3, resolution=wide).name == "b3-128x64"


def test_a_measurement_needs_no_schedule_of_the_default_resolution(pipeline: Pipeline) -> None:
    _, wide, _ = pipeline.bundle.export.resolutions
    add(pipeline, calibrated(pipeline, wide, 3))
    record = measure(pipeline.bundle, backend="auto", threads=1)
    assert record.evaluation_ms > 0
    assert Bundle.open(pipeline.bundle.directory).names("measured") == [record.runtime]


def test_a_render_uses_the_schedule_of_its_resolution(pipeline: Pipeline) -> None:
    square, wide, _ = pipeline.bundle.export.resolutions
    add(pipeline, calibrated(pipeline, square, 2), calibrated(pipeline, wide, 2))
    for width, name in ((64, "b2-64x64"), (128, "b2-128x64")):
        (made,) = pipeline.render(["a red star"], schedule=2, width=width, height=64)
        assert made.schedule == name
        assert made.pixels.shape == (64, width, 3)


def test_frames_of_a_picture_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="makes pictures, found 5 frames; leave frames out"):
        pipeline.resolution(frames=5)
