"""One bundle of two resolutions against a bundle of each alone, for every family."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.errors import ScheduleError
from meancache_trt.export import FAMILIES, PIPELINE_FOLDER, export_components
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.profiles import ShapeRange, profile
from meancache_trt.manifest import Resolution
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from meancache_trt.rendering import Rendering
from meancache_trt.session import Session
from meancache_trt.shapes import PictureSize, Range
from tests.export.families import TINY

pytestmark = pytest.mark.slow  # two exports a family

STEPS, TEXT_TOKENS, SEED = 4, 12, 5


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, and the two sizes of its bundles."""

    folder: Path
    first: PictureSize
    second: PictureSize

    def export(self, name: str, first: PictureSize, *further: PictureSize) -> Bundle:
        return create_bundle(
            self.folder.parent / f"{name}.mcb",
            lambda target: export_components(
                self.folder,
                target,
                height=first.height,
                width=first.width,
                frames=first.frames,
                further_sizes=further,
                text_tokens=TEXT_TOKENS,
                check_parity=False,
            ),
            {},
        )


SIZES = {
    "flux": ("48x32", "40x64"),
    "qwen_image": ("48x32", "24x72"),
    "z_image": ("48x32", "24x72"),
    "hunyuan_video": ("48x32x5", "32x48x9"),
    "sd3": ("48x32", "24x72"),
    "wan": ("48x32x5", "32x48x9"),
    "flux2": ("48x32", "24x72"),
}


@pytest.fixture(scope="module", params=list(SIZES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    TINY[request.param]().save_pretrained(folder)
    return Case(folder, *map(PictureSize.parse, SIZES[request.param]))


@pytest.fixture(scope="module")
def both(case: Case) -> Iterator[Pipeline]:
    with Pipeline(case.export("both", case.first, case.second)) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(case: Case) -> Iterator[Pipeline]:
    """The second size alone."""
    with Pipeline(case.export("alone", case.second)) as opened:
        yield opened


def conditioning(pipeline: Pipeline, count: int, seed: int = 0) -> Conditioning:
    """Random embeddings of `count` prompts, whose masks differ."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, record in pipeline.bundle.export.components["transformer"].inputs.items():
        sizes = record.resolved(pipeline.bundle.export.resolution.symbols, skip=1)
        if record.role == "conditioning":
            tensors[name] = generator.standard_normal((count, *sizes)).astype(record.dtype)
        elif record.role == "text_mask":
            tensors[name] = np.arange(TEXT_TOKENS) < 5 + np.arange(count)[:, None]
    return Conditioning(tuple(map(str, range(count))), tensors)


def full(pipeline: Pipeline, resolution: Resolution) -> Schedule:
    return bake("euler", pipeline.grid(STEPS, resolution), range(STEPS), name="full")


def rendered(pipeline: Pipeline, size: PictureSize) -> Rendering:
    resolution = pipeline.resolution(size.height, size.width, size.frames)
    (made,) = pipeline.render(
        conditioning(pipeline, 1),
        negative_prompt=negative(pipeline, 1),
        seed=SEED,
        schedule=full(pipeline, resolution),
        height=size.height,
        width=size.width,
        frames=size.frames,
    )
    return made


def negative(pipeline: Pipeline, count: int) -> Conditioning | str:
    is_guided = pipeline.bundle.export.guidance.is_classifier_free
    return conditioning(pipeline, count, seed=1) if is_guided else ""


def test_each_resolution_renders_what_a_bundle_made_for_it_does(
    case: Case, both: Pipeline, alone: Pipeline
) -> None:
    found, expected = rendered(both, case.second), rendered(alone, case.second)
    size = case.second
    frames = () if size.frames is None else (size.frames,)
    assert found.pixels.shape == (*frames, size.height, size.width, 3)
    assert np.array_equal(found.latent, expected.latent)
    assert np.array_equal(found.pixels, expected.pixels)
    first = rendered(both, case.first)
    assert first.pixels.shape[-3:] == (case.first.height, case.first.width, 3)


def test_a_resolution_added_later_renders_as_if_it_had_been_there(
    case: Case, both: Pipeline, alone: Pipeline, tmp_path: Path
) -> None:
    own = tmp_path / "own.mcb"
    shutil.copytree(alone.bundle.directory, own)
    before = Bundle.open(own).manifest
    options = stages.ExportOptions(
        size=(case.first.height, case.first.width),
        frames=case.first.frames,
        is_parity_checked=False,
    )
    said: list[str] = []
    bundle = stages.export(Checkpoint(case.folder), own, options, note=said.append, is_forced=False)
    assert said == [
        f"export: added {case.first} to {own}, whose graphs serve every resolution and stay as "
        "they are"
    ]
    after = Bundle.open(own).manifest
    assert after == bundle.manifest
    assert (after.bundle_id, after.files) == (before.bundle_id, before.files)
    assert after.export.sizes == [case.second, case.first]
    with Pipeline(bundle) as pipeline:
        expected = rendered(both, case.first)
        assert np.array_equal(rendered(pipeline, case.first).pixels, expected.pixels)


def test_a_batch_of_two_equals_two_singles_at_each_resolution(both: Pipeline) -> None:
    prompts, others = conditioning(both, 2), negative(both, 2)
    scale = both.guidance()
    for resolution in both.bundle.export.resolutions:
        schedule = full(both, resolution)
        noise = np.stack([philox_normal(seed, resolution.noise_shape) for seed in range(2)])
        session = Session(both.graphs, schedule, resolution, batch=2)
        fed = prompts if isinstance(others, str) else prompts.followed_by(others)
        pair = session.run(noise, fed.tensors, scale)
        for index in range(2):
            one = prompts.select(index)
            if not isinstance(others, str):
                one = one.followed_by(others.select(index))
            single = both.session(schedule, resolution)
            expected = single.run(noise[index][None], one.tensors, scale)
            # float32 matrix products may be blocked otherwise at another batch, over 4 evaluations
            np.testing.assert_allclose(pair.latents[index], expected.latents[0], rtol=0, atol=2e-5)


def record(case: Case, directory: Path, size: PictureSize) -> Any:
    options = RecordOptions(
        size=(size.height, size.width),
        frames=size.frames,
        prompts=("a", "b"),
        steps=STEPS,
        samples=2,
        text_tokens=TEXT_TOKENS,
    )
    return stages.record_pipeline(
        Checkpoint(case.folder), directory, options, note=lambda _: None, report=lambda *_: None
    )


def test_schedules_are_calibrated_for_each_resolution_under_names_of_their_own(
    case: Case, alone: Pipeline, tmp_path: Path
) -> None:
    own = tmp_path / "own.mcb"
    shutil.copytree(alone.bundle.directory, own)
    options = stages.ExportOptions(
        size=(case.first.height, case.first.width),
        frames=case.first.frames,
        is_parity_checked=False,
    )
    bundle = stages.export(
        Checkpoint(case.folder), own, options, note=lambda _: None, is_forced=False
    )
    stages.bake_into(bundle, record(case, tmp_path / "second", case.second), [2])
    with Pipeline(bundle) as pipeline:
        other = pipeline.resolution(case.first.height, case.first.width, case.first.frames)
        if pipeline.grid(STEPS, other).difference(pipeline.grid(STEPS)) is None:
            assert pipeline.schedule(2, resolution=other).name == "b2"  # one grid, one schedule
        else:
            with pytest.raises(ScheduleError, match=f"another grid.*--resolution {case.first}"):
                pipeline.schedule(2, resolution=other)
        stages.bake_into(bundle, record(case, tmp_path / "first", case.first), [2])
        assert set(bundle.schedule_names()) == {"full", "b2", f"b2-{case.first}"}
        assert pipeline.schedule(2).name == "b2"
        assert pipeline.schedule(2, resolution=other).name == f"b2-{case.first}"
        refolded = pipeline.schedule("full", resolution=other).grid
        assert refolded.sigmas == pipeline.grid(STEPS, other).sigmas


def test_tensorrt_builds_plans_for_the_bundles_profiles(both: Pipeline) -> None:
    """From the bundle alone: its graphs, and the configurations that it carries."""
    export, directory = both.bundle.export, both.bundle.directory
    family = FAMILIES[export.family]
    parts = ("transformer", "vae", *family.text_components)
    configs = Checkpoint(directory / PIPELINE_FOLDER).configs(parts)
    ranges = msgspec.structs.replace(export.ranges, batch=Range(1, 2, 4))
    for name in ("prepare", "transformer", "update/h2"):
        component = export.components[name]
        shapes = profile(component, family, configs, ranges)
        assert is_built(directory / component.path, shapes), name


def is_built(path: Path, shapes: Mapping[str, ShapeRange]) -> bool:
    """Whether TensorRT for RTX, which needs no GPU for it, takes the profile and builds a plan."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network()
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    given = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        given.set_shape(network.get_input(index).name, *shapes[network.get_input(index).name])
    config.add_optimization_profile(given)
    return builder.build_serialized_network(network, config) is not None
