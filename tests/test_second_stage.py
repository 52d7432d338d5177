"""Models of two transformers: which network a schedule row runs, and what belongs to a bundle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from meancache_trt.bundle import Bundle
from meancache_trt.calibration.trajectories import Prompt, Settings, Trajectories
from meancache_trt.cli import cli
from meancache_trt.engine_field import EngineField
from meancache_trt.engine_transformer import EngineTransformer
from meancache_trt.errors import BundleError, InputError, ScheduleError
from meancache_trt.graphs import Graphs
from meancache_trt.manifest import Exported, Guidance
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.runtime import Graph
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import SecondStage, SigmaGrid
from meancache_trt.production.batch_sizes import choose_batch, is_exact
from meancache_trt.production.tickets import Group
from meancache_trt.render import Pipeline
from meancache_trt.second_stage import check_second_stage
from meancache_trt.selection import pipeline_grid
from meancache_trt.session import Session
from tests.engine_transformer.conftest import made
from tests.engine_transformer.subjects import VELOCITY_TOLERANCE, Subject, qwen_call
from tests.export.families import shared_export
from tests.two_stages import (
    WEIGHT_SCALE,
    Arrays,
    inputs_of,
    with_export,
    with_second_stage,
)

STEPS = 8
NODES = (0, 1, 3, 4, 6)
BOUNDARY = 750.0
"""Between the steps of NODES, whose history of up to two velocities so crosses it."""

TOLERANCE = 1e-4
"""Latents up to 4 after five guided evaluations, float32 sums in another order; measured 3.5e-6."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Classifier-free guidance by one transformer."""
    return shared_export("qwen_image", tmp_path_factory).bundle


@pytest.fixture(scope="module")
def bundle(plain: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("stages") / "two.mcb"
    stage = SecondStage(boundary_timestep=BOUNDARY, guidance_scale=2.5)
    return with_second_stage(plain, directory, stage)


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Any:
    with Pipeline(bundle, backend="onnxruntime", threads=1, embedding_cache="off") as opened:
        yield opened


def grid_of(bundle: Bundle) -> SigmaGrid:
    return pipeline_grid(bundle.export, STEPS, bundle.export.resolution)


def schedule_of(bundle: Bundle, nodes: tuple[int, ...] = NODES) -> Schedule:
    return bake("ab2", grid_of(bundle), nodes)


def with_stage(bundle: Bundle, stage: SecondStage | None) -> Bundle:
    """The same graphs under another second stage."""
    export = msgspec.structs.replace(bundle.export, second_stage=stage)
    return Bundle(bundle.directory, msgspec.structs.replace(bundle.manifest, export=export))


# ------------------------------------------------------------------------------ what a row runs


class Direct:
    """The bundle's graphs, called by ONNX Runtime itself, and a loop in NumPy."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._opened = functools.cache(self._open)

    def _open(self, name: str) -> onnxruntime.InferenceSession:
        component = self._bundle.export.components[name]
        return onnxruntime.InferenceSession(self._bundle.component_path(component))

    def run(self, name: str, feeds: Arrays) -> Arrays:
        outputs = list(self._bundle.export.components[name].outputs)
        return dict(zip(outputs, self._opened(name).run(outputs, feeds), strict=True))

    def latents(
        self,
        schedule: Schedule,
        noise: NDArray[np.float32],
        conditioning: Arrays,
        scales: tuple[float, float],
    ) -> NDArray[np.float32]:
        latent = self.prepared(noise, conditioning)["latent"]
        velocities: list[NDArray[np.float32]] = []
        rows = zip(schedule.timesteps(), schedule.table(len(NODES)), strict=True)
        for timestep, row in rows:
            velocities.insert(0, self.velocity(timestep, latent, noise, conditioning, scales))
            for weight, velocity in zip(row, velocities, strict=False):
                latent = latent + weight * velocity
        return latent

    def prepared(self, noise: NDArray[np.float32], conditioning: Arrays) -> Arrays:
        given = {"noise": noise, **conditioning}
        names = self._bundle.export.components["prepare"].inputs
        return self.run("prepare", {name: given[name] for name in names})

    def velocity(
        self,
        timestep: float,
        latent: NDArray[np.float32],
        noise: NDArray[np.float32],
        conditioning: Arrays,
        scales: tuple[float, float],
    ) -> NDArray[np.float32]:
        stage = int(timestep < BOUNDARY)
        name = ("transformer", "transformer_2")[stage]
        made = {**self.prepared(noise, conditioning), **conditioning}
        made["timestep"] = np.full(2 * len(latent), timestep * np.float64(1e-3), np.float32)
        made["hidden_states"] = np.concatenate([latent, latent])
        feeds = {key: made[key] for key in self._bundle.export.components[name].inputs}
        return guided(self.run(name, feeds)["velocity"], scales[stage])


def guided(both: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """QwenImagePipeline's guidance, which keeps the length of the conditional velocity."""
    conditional, unconditional = np.split(both, 2)
    combined = unconditional + np.float32(scale) * (conditional - unconditional)
    lengths = [np.linalg.norm(v, axis=-1, keepdims=True) for v in (conditional, combined)]
    return combined * (lengths[0] / lengths[1])


@pytest.mark.parametrize("own", [2.5, None])
@pytest.mark.parametrize("batch", [1, 2])
def test_each_row_runs_its_transformer_under_its_guidance_over_one_history(
    bundle: Bundle, pipeline: Pipeline, own: float | None, batch: int
) -> None:
    stage = SecondStage(boundary_timestep=BOUNDARY, guidance_scale=own)
    staged = with_stage(bundle, stage)
    schedule = schedule_of(staged)
    assert set(schedule.transformers()) == {"transformer", "transformer_2"}
    session = Session(
        Graphs(staged, pipeline.runtime), schedule, staged.export.resolution, batch=batch
    )
    noise, conditioning = inputs_of(staged, batch)
    for scale in (4.0, 3.0):  # a constant is no picture's
        found = session.denoise(noise, conditioning, scale).latents
        scales = (scale, scale if own is None else own)
        expected = Direct(staged).latents(schedule, noise, conditioning, scales)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    others = Direct(staged).latents(schedule, noise, conditioning, (scale, 7.0))
    assert np.abs(found - others).max() > 100 * TOLERANCE


def test_schedules_are_calibrated_with_the_transformer_of_each_step(
    bundle: Bundle, pipeline: Pipeline, tmp_path: Path
) -> None:
    """The recorded grid names the stage, so that a bundle of another one is refused."""
    settings = Settings(grid=grid_of(bundle), guidance_scale=4.0)
    field = EngineField(pipeline, Trajectories(tmp_path, settings, ()), tmp_path, batch=1)
    noise, _ = inputs_of(bundle, 1)
    texts = [pipeline.encode([text]) for text in ("a fox", "")]
    conditioning = dict(texts[0].followed_by(texts[1]).tensors)
    latent = Direct(bundle).prepared(noise, conditioning)["latent"]
    for step in (1, STEPS - 2):
        found = field([Prompt("a fox")], latent.reshape(1, -1), step)
        timestep = settings.grid.timesteps[step]
        expected = Direct(bundle).velocity(timestep, latent, noise, conditioning, (4.0, 2.5))
        np.testing.assert_allclose(found, expected.reshape(1, -1), rtol=0, atol=TOLERANCE)
    stage = SecondStage(boundary_timestep=BOUNDARY, guidance_scale=3.0)
    grid = msgspec.structs.replace(settings.grid, second_stage=stage)
    other = msgspec.structs.replace(settings, grid=grid)
    with pytest.raises(ScheduleError, match=r"'the recording' was calibrated .* second stage"):
        EngineField(pipeline, Trajectories(tmp_path, other, ()), tmp_path, batch=1)


def test_only_the_transformers_that_a_schedule_names_are_loaded(pipeline: Pipeline) -> None:
    wrapped: list[Graph] = []

    def note(graph: Graph) -> Graph:
        wrapped.append(graph)
        return graph

    for nodes, count in (((0, 1), 1), (NODES, 2)):
        wrapped.clear()
        schedule = schedule_of(pipeline.bundle, nodes)
        Session(pipeline.graphs, schedule, pipeline.resolution(), wrap_transformer=note)
        assert len(wrapped) == count


def test_a_batch_size_is_tried_with_both_transformers(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, nodes = Session.evaluate, []

    def noted(session: Session, node: int, latents: np.ndarray, *others: Any) -> np.ndarray:
        nodes.append(node)
        velocities = evaluate(session, node, latents, *others)
        is_off = len(latents) > 1 and session.loop.schedule.transformers()[node] != "transformer"
        return velocities * np.float32(1 + 1e-6 * is_off)

    monkeypatch.setattr(Session, "evaluate", noted)
    schedule = schedule_of(pipeline.bundle)
    group = Group(schedule, pipeline.resolution())
    assert not is_exact(pipeline.graphs, group, 2)
    nodes.clear()
    choose_batch(pipeline.graphs, group, limit=1)
    assert set(nodes) == {0, schedule.transformers().index("transformer_2")}


# ------------------------------------------------------------------------------ what fits a bundle


def test_a_schedule_that_names_no_second_stage_gets_the_bundles(pipeline: Pipeline) -> None:
    grid = msgspec.structs.replace(grid_of(pipeline.bundle), second_stage=None)
    fitted = pipeline.schedule(bake("ab2", grid, NODES))
    assert fitted == schedule_of(pipeline.bundle)


def test_only_an_uncalibrated_schedule_moves_to_another_boundary(pipeline: Pipeline) -> None:
    stage = SecondStage(boundary_timestep=600.0)
    grid = msgspec.structs.replace(grid_of(pipeline.bundle), second_stage=stage)
    elsewhere = bake("ab2", grid, NODES)
    assert pipeline.schedule(elsewhere) == schedule_of(pipeline.bundle)
    calibrated = msgspec.structs.replace(elsewhere, calibration=Evidence(samples=1, seconds=0.0))
    expected = "second stage below timestep 600 against below timestep 750, guidance scale 2.5"
    with pytest.raises(ScheduleError, match=expected):
        pipeline.schedule(calibrated)


def test_a_model_of_one_transformer_takes_no_schedule_of_two(plain: Bundle, bundle: Bundle) -> None:
    with (
        Pipeline(plain, backend="onnxruntime", threads=1, embedding_cache="off") as single,
        pytest.raises(ScheduleError, match=r"below timestep 750.*has one transformer"),
    ):
        single.schedule(schedule_of(bundle))


def test_a_session_takes_no_schedule_that_was_not_fitted(pipeline: Pipeline) -> None:
    grid = msgspec.structs.replace(grid_of(pipeline.bundle), second_stage=None)
    with pytest.raises(ScheduleError, match=r"second stage, below timestep 750.*found None"):
        Session(pipeline.graphs, bake("ab2", grid, NODES), pipeline.resolution())


def check(export: Exported, **changes: Any) -> None:
    check_second_stage(msgspec.structs.replace(export, **changes))


def test_a_stage_and_its_graphs_are_there_together(plain: Bundle, bundle: Bundle) -> None:
    stage, components = bundle.export.second_stage, dict(bundle.export.components)
    check(bundle.export)
    check(plain.export)
    with pytest.raises(BundleError, match=r"transformer_2, .*found the stage below timestep 750"):
        check(plain.export, second_stage=stage)
    with pytest.raises(BundleError, match=r"the stage None and transformer_2 in .* beside"):
        check(bundle.export, second_stage=None)
    components.pop("transformer_2/bfloat16")
    with pytest.raises(BundleError, match=r"\['float32'\] beside .*\['bfloat16', 'float32'\]"):
        check(bundle.export, components=components)


def test_a_stage_is_part_of_a_bundles_identity(bundle: Bundle, tmp_path: Path) -> None:
    for number, scale in enumerate((2.5, 3.0)):
        stage = SecondStage(boundary_timestep=BOUNDARY, guidance_scale=scale)
        export = msgspec.structs.replace(bundle.export, second_stage=stage)
        again = with_export(bundle, tmp_path / str(number), export)
        is_same = again.manifest.bundle_id == bundle.manifest.bundle_id
        assert is_same == (stage == bundle.export.second_stage)


def test_a_second_guidance_scale_is_one_that_the_model_can_take(bundle: Bundle) -> None:
    low = SecondStage(boundary_timestep=BOUNDARY, guidance_scale=0.5)
    with pytest.raises(InputError, match=r"at least 1, which leaves .*found 0.5"):
        check(bundle.export, second_stage=low)
    with pytest.raises(InputError, match=r"classifier-free guidance only, found 2.5"):
        check(bundle.export, guidance=Guidance("embedded", 3.5))


# ------------------------------------------------------------------------------ beside the loop


def test_either_transformer_stands_in_for_the_one_of_a_pipeline(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    subject: Subject = made("qwen_image", tmp_path_factory)
    network, call = subject.pipeline.transformer, qwen_call(2, 3, 4, 8)
    for part, scale in (("transformer", 1.0), ("transformer_2", WEIGHT_SCALE)):
        with torch.no_grad():
            for weight in network.parameters():
                weight.mul_(scale)
            expected = network(**call).sample
        with EngineTransformer(bundle, part=part, backend="onnxruntime", threads=1) as engine:
            velocity = engine(**call).sample
        # larger weights make larger velocities, which round more
        np.testing.assert_allclose(velocity, expected, rtol=0, atol=4 * VELOCITY_TOLERANCE)
    with pytest.raises(BundleError, match="transformer, transformer_2, found 'vae_decoder'"):
        EngineTransformer(bundle, part="vae_decoder")
    with pytest.raises(BundleError, match=r"networks, transformer, found 'transformer_2'"):
        EngineTransformer(subject.bundle, part="transformer_2")


def test_inspect_names_the_boundary_and_the_network_of_each_row(
    bundle: Bundle, tmp_path: Path
) -> None:
    def shown(*arguments: object) -> list[list[str]]:
        done = CliRunner().invoke(cli, ["inspect", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        return [line.split() for line in done.output.splitlines()]

    schedule = schedule_of(bundle)
    file = tmp_path / "two.json"
    file.write_bytes(msgspec.json.encode(schedule))
    stage = ["transformer_2", "below", "timestep", "750,", "guidance", "scale", "2.5"]
    assert ["stage", "2", *stage] in shown(bundle.directory)
    lines = shown(file)
    assert stage in lines
    rows = [line for line in lines if line and line[0].isdecimal()]
    assert [row[2] for row in rows] == list(schedule.transformers())
