"""Asks what a schedule is worth where it was not calibrated, and how few samples it takes.

On the FLUX.1 stand-in: other guidance scales, step counts and resolutions, prompts and numbers of
samples; and whether the errors of a schedule's edges say anything about its final error. In the
transfers a schedule is forced where hosts would refuse it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import bake_schedules
from meancache_trt.calibration.metrics import psnr, summarize
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.engine_field import engine_field
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from meancache_trt.shapes import PictureSize

BUDGETS = (6, 10, 15)
PROMPTS = 24
SIDE, OTHER_SIDE = 64, 96
SCALE, SCALES, RANGE = 3.5, (2.0, 3.5, 5.0, 6.0), (2.0, 6.0)
STEPS, OTHER_STEPS, FINE_STEPS = 50, 28, 200
SAMPLES = (2, 4, 8, 16, 32)

Row = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """What pictures are rendered with, and what they are compared with."""

    scale: float = SCALE
    side: int = SIDE
    steps: int = STEPS


class Study:
    """One bundle of both sizes, and recordings in a work directory."""

    def __init__(self, pipeline: Pipeline, work: Path) -> None:
        self._pipeline, self._work = pipeline, work
        self._checkpoint = stages.find_model("standin/flux")
        self._prompts = pipeline.encode(standins.prompts("evaluation")[:PROMPTS])
        self._references: dict[Setting, np.ndarray] = {}

    def recorded(
        self,
        setting: Setting,
        samples: int = 16,
        guidance_range: tuple[float, float] | None = None,
    ) -> Trajectories:
        """A recording, made once."""
        options = RecordOptions(
            size=(setting.side, setting.side),
            prompts=stages.default_prompts(self._checkpoint),
            steps=setting.steps,
            samples=samples,
            guidance_scale=None if guidance_range else setting.scale,
            guidance_range=guidance_range,
        )
        directory = self._work / f"{setting}-{samples}-{guidance_range}"
        return stages.record_pipeline(
            self._checkpoint, directory, options, note=_note, report=lambda *_: None
        )

    def fitted(self, trajectories: Trajectories) -> dict[int, Schedule]:
        """A fitted schedule for each budget."""
        with engine_field(self._pipeline, trajectories) as field:
            baked = bake_schedules(trajectories, BUDGETS, None, field)
        return {schedule.budget: schedule for schedule in baked}

    def psnr(self, schedule: Schedule, setting: Setting) -> np.ndarray:
        """Of each picture in dB, against all steps of the setting's own grid."""
        if setting not in self._references:
            self._references[setting] = self._pictures(self._euler(setting, setting.steps), setting)
        return psnr(self._pictures(schedule, setting), self._references[setting])

    def euler_db(self, setting: Setting, budget: int) -> Row:
        """Euler on its own grid of B steps: what needs no calibration."""
        return _summary(self.psnr(self._euler(setting, budget), setting))

    def _euler(self, setting: Setting, steps: int) -> Schedule:
        resolution = self._pipeline.resolution(setting.side, setting.side)
        return bake("euler", self._pipeline.grid(steps, resolution), range(steps))

    def _pictures(self, schedule: Schedule, setting: Setting) -> np.ndarray:
        """Rendered under the setting, whatever the schedule was calibrated for."""
        side = setting.side
        grid = msgspec.structs.replace(schedule.grid, height=side, width=side)
        forced = msgspec.structs.replace(
            schedule, grid=grid, guidance_scale=None, guidance_range=None
        )
        rendered = self._pipeline.render(
            self._prompts,
            seed=[1000 + index for index in range(PROMPTS)],
            schedule=forced,
            guidance_scale=setting.scale,
            height=side,
            width=side,
        )
        return np.stack([picture.pixels for picture in rendered])


def main() -> None:
    """Run all questions and write the record."""
    with tempfile.TemporaryDirectory() as work:
        bundle = _exported(Path(work))
        with Pipeline(bundle, threads=1) as pipeline:
            study = Study(pipeline, Path(work))
            own = study.fitted(study.recorded(Setting()))
            record = {
                "guidance_scales": _guidance(study, own),
                "resolution": _elsewhere(study, own, Setting(side=OTHER_SIDE)),
                "steps": _elsewhere(study, own, Setting(steps=OTHER_STEPS)),
                "fine_reference": _elsewhere(study, own, Setting(steps=FINE_STEPS)),
                "samples": _sample_sizes(study),
                "prompts": _prompts(study, own),
                "edge_errors": _edge_errors(own.values()),
            }
    path = Path(__file__).parents[2] / "docs" / "proof" / "transfer.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    _print(record)


def _exported(work: Path) -> Bundle:
    options = stages.ExportOptions(
        size=(SIDE, SIDE), further_sizes=(PictureSize(OTHER_SIDE, OTHER_SIDE),)
    )
    checkpoint = stages.find_model("standin/flux")
    return stages.export(checkpoint, work / "flux.mcb", options, note=_note, is_forced=False)


def _guidance(study: Study, own: dict[int, Schedule]) -> list[Row]:
    """Schedules of one scale, of the range, and of the very scale, at several scales."""
    ranged = study.fitted(study.recorded(Setting(), guidance_range=RANGE))
    rows = []
    for scale in SCALES:
        setting = Setting(scale=scale)
        there = own if scale == SCALE else study.fitted(study.recorded(setting))
        for budget in BUDGETS:
            rows.append(
                {
                    "scale": scale,
                    "budget": budget,
                    "euler": study.euler_db(setting, budget),
                    f"calibrated at {SCALE}": _summary(study.psnr(own[budget], setting)),
                    "calibrated there": _summary(study.psnr(there[budget], setting)),
                    "calibrated for {:g} to {:g}".format(*RANGE): _summary(
                        study.psnr(ranged[budget], setting)
                    ),
                }
            )
    return rows


def _elsewhere(study: Study, own: dict[int, Schedule], setting: Setting) -> list[Row]:
    """Schedules of the usual setting, and of another, in that other."""
    _note(f"{setting}")
    there = study.fitted(study.recorded(setting))
    return [
        {
            "setting": msgspec.to_builtins(setting),
            "budget": budget,
            "euler": study.euler_db(setting, budget),
            "calibrated at the usual setting": _summary(study.psnr(own[budget], setting)),
            "calibrated there": _summary(study.psnr(there[budget], setting)),
        }
        for budget in BUDGETS
    ]


def _sample_sizes(study: Study) -> list[Row]:
    rows = []
    for samples in SAMPLES:
        _note(f"{samples} samples")
        made = study.fitted(study.recorded(Setting(), samples))
        for budget in BUDGETS:
            found = _summary(study.psnr(made[budget], Setting()))
            rows.append({"samples": samples, "budget": budget, "new prompts": found})
    return rows


def _prompts(study: Study, own: dict[int, Schedule]) -> list[Row]:
    """What the calibration samples promised, each held out, and what new prompts gave."""
    return [
        {
            "budget": budget,
            "held-out samples": msgspec.to_builtins(schedule.calibration.fidelity.psnr),
            "new prompts": _summary(study.psnr(schedule, Setting())),
        }
        for budget, schedule in own.items()
        if schedule.calibration and schedule.calibration.fidelity
    ]


def _edge_errors(schedules: Iterable[Schedule]) -> list[Row]:
    """The final error as a fraction of the sum of the edges' errors, which would bound it.

    It would where errors were neither amplified by later steps nor mended by later rows.
    """
    rows = []
    for schedule in schedules:
        evidence = schedule.calibration
        if evidence and evidence.fidelity and evidence.edge_costs:
            total = sum(evidence.edge_costs)
            rows.append(
                {
                    "budget": schedule.budget,
                    "sum of edge errors": total,
                    "final error": evidence.fidelity.latent_error,
                    "ratio": evidence.fidelity.latent_error / total,
                }
            )
    return rows


def _summary(values: np.ndarray) -> Row:
    found = summarize(values)
    return {"mean": found.mean, "p5": found.p5, "worst": found.worst}


def _print(record: dict[str, list[Row]]) -> None:
    for question, rows in record.items():
        print(f"\n{question.replace('_', ' ')}")
        for row in rows:
            print("  " + "; ".join(f"{key} {_cell(value)}" for key, value in row.items()))


def _cell(value: object) -> str:
    if isinstance(value, dict) and "mean" in value:
        return "{mean:.1f}/{p5:.1f}/{worst:.1f} dB".format(**value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _note(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
