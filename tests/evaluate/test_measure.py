"""Measuring on a bundle's engine, against metrics of what `render` makes of the same prompts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.calibration.evaluation import Evaluation, Setup, load_evaluation
from meancache_trt.calibration.metrics import latent_error, psnr, ssim
from meancache_trt.calibration.trajectories import Prompt, Sample, Settings, Trajectories
from meancache_trt.errors import InputError, RenderError
from meancache_trt.evaluate.competitors import Competitor, of_schedules
from meancache_trt.evaluate.measure import Plan, check_unseen, measure
from meancache_trt.evaluate.pictures import PictureStore
from meancache_trt.evaluate.renderer import EngineRenderer, Render, Renderer, other_precisions
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import SigmaGrid, make_grid
from meancache_trt.render import Pipeline
from meancache_trt.session import Batch

STEPS = 6
PROMPTS = (
    Prompt("large plain red circle left gray", 3),
    Prompt("small striped blue star right pink", 4),
    Prompt("large dotted green ring center navy", 5),
)

TOLERANCE = 2e-3
"""dB; float32 sums in another order where a batch is larger, at about 30 dB."""


@dataclass
class Counted:
    """A renderer that counts what it renders, and fails where it is told to."""

    renderer: Renderer
    rendered: list[tuple[str, int]] = field(default_factory=list)
    fails_at: str | None = None

    @property
    def batch(self) -> int:
        return self.renderer.batch

    def grid(self, steps: int) -> SigmaGrid:
        return self.renderer.grid(steps)

    def setup(self, steps: int, reference_steps: int | None) -> Setup:
        return self.renderer.setup(steps, reference_steps)

    def open(self, schedule: Schedule) -> Render:
        render = self.renderer.open(schedule)

        def counted(prompts: Sequence[Prompt]) -> Batch:
            if schedule.name == self.fails_at:
                raise RenderError("the machine was switched off")
            self.rendered.append((schedule.name, len(prompts)))
            return render(prompts)

        return counted


@pytest.fixture(scope="module")
def pipeline(shared_bundle: Path) -> Iterator[Pipeline]:
    """One thread: these pictures are too small for more."""
    with Pipeline(Bundle.open(shared_bundle), threads=1) as opened:
        yield opened


@pytest.fixture
def renderer(pipeline: Pipeline, tmp_path: Path) -> Counted:
    return Counted(EngineRenderer(pipeline, pipeline.resolution(), tmp_path, batch=2))


@pytest.fixture
def competitors(pipeline: Pipeline) -> list[Competitor]:
    grid = pipeline.grid(STEPS)
    return of_schedules(
        [
            bake("euler", grid, [0, 2, 4]),
            bake("ab2", grid, [0, 2, 4]),
            bake("euler", grid, range(STEPS)),
        ]
    )


def run(
    renderer: Renderer, competitors: Sequence[Competitor], directory: Path, **changes: object
) -> Evaluation:
    plan = replace(Plan(prompts=PROMPTS, steps=STEPS, reference_steps=12), **changes)  # type: ignore[arg-type]
    store = PictureStore(directory)
    return measure(
        renderer,
        competitors,
        plan,
        directory,
        pictures=store,
        note=lambda _: None,
        report=lambda *_: None,
    )


@pytest.fixture
def evaluation(renderer: Counted, competitors: list[Competitor], tmp_path: Path) -> Evaluation:
    return run(renderer, competitors, tmp_path)


def test_the_values_are_the_metrics_of_rendered_pictures(
    evaluation: Evaluation, pipeline: Pipeline
) -> None:
    def pictures(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
        texts, seeds = [p.text for p in PROMPTS], [p.seed for p in PROMPTS]
        made = pipeline.render(texts, seed=seeds, schedule=schedule)
        return np.stack([m.pixels for m in made]), np.stack([m.latent for m in made])

    cached = pictures(bake("euler", pipeline.grid(STEPS), [0, 2, 4]))
    row = evaluation.row("euler", 3)
    assert row is not None
    for steps, found in ((STEPS, row.own), (12, row.fine)):
        full = pictures(bake("euler", pipeline.grid(steps), range(steps)))
        assert found is not None
        np.testing.assert_allclose(found.psnr.values, psnr(cached[0], full[0]), atol=TOLERANCE)
        np.testing.assert_allclose(found.ssim.values, ssim(cached[0], full[0]), atol=1e-4)
        expected = latent_error(cached[1], full[1])
        np.testing.assert_allclose(found.latent_error.values, expected, rtol=1e-3)


def test_all_steps_are_the_reference_itself(evaluation: Evaluation) -> None:
    row = evaluation.row("euler", STEPS)
    assert row is not None
    assert row.own is not None
    assert row.own.psnr.values == (100.0,) * 3
    assert row.own.latent_error.values == (0.0,) * 3
    assert row.fine == evaluation.full.fine
    assert evaluation.full.own is None


def test_rows_tell_their_schedule_their_time_and_what_they_are_above(
    evaluation: Evaluation,
) -> None:
    row = evaluation.row("ab2", 3)
    assert row is not None
    assert row.schedule.nodes == (0, 2, 4)
    assert row.schedule.sigmas[0] == 1.0
    assert row.ms_per_evaluation > 0
    assert evaluation.against == "euler"
    assert row.own is not None
    assert row.own.psnr.difference is not None


def test_the_file_is_the_result_and_references_are_gone(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    assert load_evaluation(tmp_path / "evaluation.json") == evaluation
    assert not (tmp_path / "references").exists()
    assert len(list((tmp_path / "thumbnails").rglob("*.png"))) == 4 * len(PROMPTS)


def test_every_picture_is_rendered_once_in_batches(
    evaluation: Evaluation, renderer: Counted
) -> None:
    del evaluation
    for name in ("full-6", "full-12", "ab2-b3", "euler-b3"):
        assert [n for rendered, n in renderer.rendered if rendered == name] == [2, 1]


def test_an_interrupted_run_loses_only_the_row_that_it_was_at(
    renderer: Counted, competitors: list[Competitor], tmp_path: Path
) -> None:
    renderer.fails_at = "ab2-b3"
    with pytest.raises(RenderError):
        run(renderer, competitors, tmp_path)
    before = len(renderer.rendered)
    renderer.fails_at = None
    resumed = run(renderer, competitors, tmp_path)
    names = {name for name, _ in renderer.rendered[before:]}
    assert names == {"ab2-b3", "euler-b6"}  # references and the finished row are on disk
    fresh = run(renderer, competitors, tmp_path / "fresh")
    for one, other in zip(resumed.rows, fresh.rows, strict=True):
        assert one.own == other.own


def test_other_prompts_are_measured_anew(
    renderer: Counted, competitors: list[Competitor], tmp_path: Path
) -> None:
    first = run(renderer, competitors[:1], tmp_path)
    second = run(renderer, competitors[:1], tmp_path, prompts=PROMPTS[1:])
    assert second.rows[0].own is not None
    assert first.rows[0].own is not None
    expected = first.rows[0].own.psnr.values[1:]
    np.testing.assert_allclose(second.rows[0].own.psnr.values, expected, atol=TOLERANCE)


def test_a_method_to_compare_with_must_be_measured(
    renderer: Counted, competitors: list[Competitor], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="one of the evaluated methods, euler, ab2; found 'magic'"):
        run(renderer, competitors, tmp_path, against="magic")
    assert not renderer.rendered


def test_a_coarse_fine_reference_is_refused() -> None:
    with pytest.raises(InputError, match="more steps than the model's own 6, found 6"):
        Plan(prompts=PROMPTS, steps=6, reference_steps=6)


def in_another_precision(bundle: Bundle, path: Path) -> Bundle:
    """The bundle with its float32 network listed as float16 too, with a graph at `path`."""
    parts = bundle.export.components
    other = msgspec.structs.replace(parts["transformer"], precision="float16", path=str(path))
    export = msgspec.structs.replace(
        bundle.export, components={**parts, "transformer/float16": other}
    )
    return Bundle(bundle.directory, msgspec.structs.replace(bundle.manifest, export=export))


def test_a_second_precision_that_runs_is_the_noise_floor(
    renderer: Counted, competitors: list[Competitor], pipeline: Pipeline, tmp_path: Path
) -> None:
    own = Path(pipeline.bundle.export.components["transformer"].path)
    bundle = in_another_precision(pipeline.bundle, own)
    (precision,) = other_precisions(bundle)
    with Pipeline(bundle, precision=precision) as opened:
        floor = EngineRenderer(opened, opened.resolution(), tmp_path, batch=2)
        found = run(renderer, competitors[:1], tmp_path, rounded=[floor]).noise_floor
    assert found is not None
    assert (found.method, found.budget) == ("full, float16", STEPS)
    assert found.own is not None
    assert found.own.psnr.values == (100.0,) * 3  # it is the same graph


def test_a_second_precision_that_does_not_run_is_noted(
    renderer: Counted, competitors: list[Competitor], pipeline: Pipeline, tmp_path: Path
) -> None:
    bundle = in_another_precision(pipeline.bundle, Path("absent.onnx"))
    (precision,) = other_precisions(bundle)
    with Pipeline(bundle, precision=precision) as opened:
        floor = EngineRenderer(opened, opened.resolution(), tmp_path, batch=2)
        found = run(renderer, competitors[:1], tmp_path, rounded=[floor])
    assert found.noise_floor is None
    assert "the float16 graphs of the bundle do not run here" in found.notes[0]


def recordings(*prompts: Prompt) -> Trajectories:
    samples = tuple(Sample(prompt, "none", 0.0) for prompt in prompts)
    return Trajectories(Path("recorded"), Settings(grid=make_grid(6)), samples)


def test_a_prompt_with_the_seed_that_it_was_calibrated_with_is_refused() -> None:
    recorded = recordings(Prompt("another", 1), Prompt(PROMPTS[1].text, 4, 3.5))
    with pytest.raises(InputError, match=f"found '{PROMPTS[1].text}' with seed 4 in recorded"):
        check_unseen(PROMPTS, recorded)


def test_a_prompt_that_was_calibrated_on_with_another_seed_is_noted() -> None:
    (note,) = check_unseen(PROMPTS, recordings(Prompt(PROMPTS[1].text, 0)))
    assert "1 of the prompts were calibrated on too" in note
    assert check_unseen(PROMPTS, recordings(Prompt("another", 3))) == ()


def test_thumbnails_that_are_gone_are_made_again(
    renderer: Counted, competitors: list[Competitor], tmp_path: Path
) -> None:
    run(renderer, competitors[:1], tmp_path)
    shutil.rmtree(tmp_path / "thumbnails" / "euler-b3")
    run(renderer, competitors[:1], tmp_path)
    assert len(list((tmp_path / "thumbnails" / "euler-b3").iterdir())) == len(PROMPTS)
