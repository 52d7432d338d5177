"""Models of two transformers in the C++ host, against the Python host on the same bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scripts.host.mutations import sealed

from meancache_trt.bundle import Bundle
from meancache_trt.engine.native import NativeBundle, NativeLibrary
from meancache_trt.errors import MeanCacheError
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.schedule import Schedule, bake, save_schedule
from meancache_trt.meancache.sigmas import SecondStage
from meancache_trt.render import Pipeline
from meancache_trt.session import Session
from tests.export.families import shared_export
from tests.fakes.plans import add_plan
from tests.host.conftest import Host
from tests.host.test_parity import LATENT_TOLERANCE
from tests.host.test_plans import check as check_plans_of_both
from tests.two_stages import inputs_of, with_second_stage

STEPS, NODES, BOUNDARY = 8, (0, 1, 3, 4, 6), 750.0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_export("qwen_image", tmp_path_factory).bundle


@pytest.fixture(scope="module", params=[2.5, None])
def bundle(
    request: pytest.FixtureRequest, plain: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """With and without a guidance scale of the second transformer's own."""
    stage = SecondStage(boundary_timestep=BOUNDARY, guidance_scale=request.param)
    return with_second_stage(plain, tmp_path_factory.mktemp("stages") / "two.mcb", stage)


def pipeline_of(bundle: Bundle) -> Pipeline:
    return Pipeline(bundle, threads=1, embedding_cache="off")


def schedule_of(bundle: Bundle, stage: SecondStage | None, **changes: Any) -> Schedule:
    with pipeline_of(bundle) as pipeline:
        grid = msgspec.structs.replace(pipeline.grid(STEPS), second_stage=stage)
    return bake("ab2", grid, NODES, **changes)


@pytest.mark.parametrize("batch", [1, 2])
def test_latents_equal_the_python_hosts(
    bundle: Bundle, library: NativeLibrary, tmp_path: Path, batch: int
) -> None:
    """Also of a schedule that says nothing of a second stage, or names another boundary."""
    noise, conditioning = inputs_of(bundle, batch)
    path = tmp_path / "ab2.json"
    for stage in (bundle.export.second_stage, None, SecondStage(boundary_timestep=500.0)):
        save_schedule(schedule_of(bundle, stage), path)
        with pipeline_of(bundle) as pipeline:
            chosen = pipeline.schedule(path)
            assert set(chosen.transformers()) == {"transformer", "transformer_2"}
            session = Session(pipeline.graphs, chosen, pipeline.resolution(), batch=batch)
            expected = session.denoise(noise, conditioning, pipeline.guidance(None, chosen))
        with (
            NativeBundle(bundle.directory, library=library) as opened,
            opened.session(str(path), batch=batch, threads=1) as native,
        ):
            native.set_conditioning(conditioning)
            found = native.run(noise)
        np.testing.assert_allclose(found, expected.latents, rtol=0, atol=LATENT_TOLERANCE)


# ------------------------------------------------------------------------------ refusals


def assert_same_error(python: Callable[[], object], native: Callable[[], object]) -> str:
    with pytest.raises(MeanCacheError) as expected:
        python()
    with pytest.raises(MeanCacheError) as found:
        native()
    assert str(found.value) == str(expected.value)
    assert found.type is expected.type
    return str(found.value)


SCHEDULES: dict[str, tuple[str, SecondStage]] = {
    "another boundary": ("second stage below", SecondStage(boundary_timestep=600.5)),
    "another scale": (
        "against below timestep 750",
        SecondStage(boundary_timestep=BOUNDARY, guidance_scale=3.25),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_calibrated_schedules_of_another_stage_are_refused_in_the_same_words(
    bundle: Bundle, plain: Bundle, library: NativeLibrary, tmp_path: Path, name: str
) -> None:
    expected, stage = SCHEDULES[name]
    path = tmp_path / "fit.json"
    save_schedule(schedule_of(bundle, stage, calibration=Evidence(samples=1, seconds=0.0)), path)
    for of, words in ((bundle, expected), (plain, "this bundle has one transformer")):
        with pipeline_of(of) as pipeline, NativeBundle(of.directory, library=library) as opened:
            said = assert_same_error(
                lambda: pipeline.schedule(path),
                lambda: opened.session(str(path), threads=1),
            )
        assert words in said


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"boundary_timestep": -1.0}, "0 or more and finite, found -1"),
        ({"boundary_timestep": 5.0, "guidance_scale": 2000.0}, "0 to 1000, found 2000.0"),
        ({"guidance_scale": 2.0}, "missing required field `boundary_timestep`"),
        ({"boundary_timestep": 5.0, "more": 1}, "unknown field `more`"),
        (3, "Expected `object | null`, got `int`"),
    ],
)
def test_stages_that_cannot_be_are_refused_in_the_same_words(
    plain: Bundle, library: NativeLibrary, tmp_path: Path, stage: object, words: str
) -> None:
    values = msgspec.to_builtins(schedule_of(plain, None))
    values["grid"]["second_stage"] = stage
    path = tmp_path / "odd.json"
    path.write_bytes(msgspec.json.encode(values))
    with pipeline_of(plain) as pipeline, NativeBundle(plain.directory, library=library) as opened:
        said = assert_same_error(
            lambda: pipeline.schedule(path), lambda: opened.session(str(path), threads=1)
        )
    assert words in said


Edit = Callable[[dict[str, Any]], object]
MANIFESTS: dict[str, tuple[str, Edit]] = {
    "no second transformer": (
        "transformer_2 in [] beside transformer in ['bfloat16', 'float32']; build the bundle",
        lambda export: [
            export["components"].pop(name) for name in ("transformer_2", "transformer_2/bfloat16")
        ],
    ),
    "no stage": ("found the stage None and", lambda export: export.pop("second_stage")),
    "a precision is missing": (
        "transformer_2 in ['float32'] beside",
        lambda export: export["components"].pop("transformer_2/bfloat16"),
    ),
    "other tensors": (
        "transformer_2 in ['bfloat16', 'float32'] beside",
        lambda export: export["components"]["transformer_2"]["inputs"].pop("timestep"),
    ),
    "a scale that cannot be": (
        "at least 1, which leaves the negative prompt without effect, found 0.5",
        lambda export: export["second_stage"].update(guidance_scale=0.5),
    ),
    "a scale for another rule": (
        "only, found 2.5 and the rule 'embedded'; leave it out",
        lambda export: (
            export["guidance"].update(rule="embedded"),
            export["second_stage"].update(guidance_scale=2.5),
        ),
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_stage_and_its_graphs_are_there_together_in_either_host(
    bundle: Bundle, library: NativeLibrary, tmp_path: Path, name: str
) -> None:
    words, edit = MANIFESTS[name]
    manifest = json.loads((bundle.directory / "manifest.json").read_bytes())
    edit(manifest["export"])
    (tmp_path / "manifest.json").write_bytes(sealed(manifest))
    said = assert_same_error(
        lambda: Bundle.open(tmp_path), lambda: NativeBundle(tmp_path, library=library)
    )
    assert words in said


# ------------------------------------------------------------------------------ plans


def test_both_hosts_need_plans_of_both_transformers(
    bundle: Bundle, host: Host, tmp_path: Path
) -> None:
    own = tmp_path / "own.mcb"
    shutil.copytree(bundle.directory, own)
    two, version = Bundle.open(own), "1.7.1.116"

    def said() -> list[str]:
        return check_plans_of_both(host, own, "tensorrt_rtx", version, "8.9").splitlines()[-2:]

    others = [name for name in two.export.components if not name.startswith("transformer")]
    for name in (*others, "transformer/bfloat16", "transformer_2"):
        add_plan(two, name, version=version)
    precisions, everything = said()
    assert precisions == "precisions: bfloat16, float16, float32"
    assert "expected a plan of transformer by" in everything
    add_plan(two, "transformer_2/bfloat16", version=version)
    add_plan(two, "transformer", version=version)
    assert said() == ["precisions: bfloat16, float32, float16", "all: planned"]
