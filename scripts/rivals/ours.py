"""This project's schedules in the same pipeline, by its own diffusers scheduler."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from scripts.rivals.rival import Rival
from scripts.rivals.subject import STEPS, Subject

from meancache_trt import build as stages
from meancache_trt.calibration.baking import BakeOptions, bake_schedules
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.engine_field import engine_field
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.schedule import FITTED, Schedule
from meancache_trt.record import Note, RecordOptions
from meancache_trt.render import Pipeline

SAMPLES = 16
OFFICIAL_BUDGETS = (5, 6, 8, 10, 12, 15, 20, 25)
FITTED_BUDGETS = (*range(5, 19), 20, 22, 25)
"""Close together, so that a rival of any work meets a table that takes hardly less."""
BATCH = 8


@contextlib.contextmanager
def calibration(subject: Subject, note: Note) -> Iterator[tuple[Trajectories, VelocityField]]:
    """Recordings of calibration prompts, and the network that was recorded, by its own engine."""
    recording = RecordOptions(
        size=(subject.call.height, subject.call.width),
        prompts=stages.default_prompts(subject.checkpoint),
        steps=STEPS,
        samples=SAMPLES,
    )
    exporting = stages.ExportOptions(size=recording.size, is_parity_checked=False)
    with tempfile.TemporaryDirectory() as work:
        trajectories = stages.record_pipeline(
            subject.checkpoint, Path(work) / "samples", recording, note=note, report=_no_report
        )
        bundle = stages.export(
            subject.checkpoint, Path(work) / "model.mcb", exporting, note=note, is_forced=False
        )
        with (
            Pipeline(bundle, threads=1) as pipeline,
            engine_field(pipeline, trajectories, batch=BATCH) as field,
        ):
            yield trajectories, field


def schedules(trajectories: Trajectories, field: VelocityField) -> dict[str, list[Schedule]]:
    """`official` and `fitted` schedules by method, one a budget."""
    fitted = bake_schedules(trajectories, FITTED_BUDGETS, BakeOptions(FITTED), field)
    official = bake_schedules(trajectories, OFFICIAL_BUDGETS, BakeOptions("official"))
    return {"official": list(official), FITTED: list(fitted)}


def rivals(baked: Mapping[str, list[Schedule]]) -> Iterator[Rival]:
    """Every schedule as a way to render."""
    for method, of_method in baked.items():
        for schedule in of_method:
            yield Rival(method, f"B = {schedule.budget}", partial(_scheduled, schedule))


@contextlib.contextmanager
def _scheduled(schedule: Schedule, subject: Subject) -> Iterator[int]:
    scheduler = MeanCacheScheduler.from_schedule(schedule, subject.pipeline.scheduler)
    with subject.scheduler(scheduler):
        yield STEPS


def _no_report(_done: int, _all: int) -> None: ...
