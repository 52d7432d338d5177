"""Compares fitted schedules with every other method on the evaluation prompts of a stand-in.

The official rule is given twelve tries: the best of twelve variants (costs, γ, spans, with refitted
spans and without), by the pictures of the calibration samples, for each budget. Then fitted
schedules are asked for a quality instead of a budget, and the held-out prompts say whether it was
kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.calibration.baking import (
    BakeOptions,
    bake_for_goal,
    bake_schedules,
    bakeable_methods,
)
from meancache_trt.calibration.fidelity import Judge, judging
from meancache_trt.calibration.metrics import paired_difference, psnr, summarize
from meancache_trt.calibration.sequential_fit import FitOptions
from meancache_trt.calibration.target import Goal
from meancache_trt.calibration.trajectories import Prompt, Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.engine_field import engine_field
from meancache_trt.evaluate.renderer import EngineRenderer
from meancache_trt.meancache.schedule import FITTED, Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline

BUDGETS = (5, 6, 8, 10, 12, 15, 20, 25)
SAMPLES, PROMPTS, BATCH = 16, 32, 16
OFFICIAL = [
    BakeOptions("official", scaling=scaling, gamma=gamma, max_span=span, is_refitted=is_refitted)
    for scaling, is_refitted in (("displacement", True), ("relative", False))
    for gamma in (2.0, 3.0, 4.0)
    for span in (3, 6)
]
VARIANTS = {
    "euler, own grid": BakeOptions("euler", placement="own-grid"),
    "ab2, path": BakeOptions("ab2", placement="path"),
    "taylor1, path": BakeOptions("taylor1", placement="path"),
    "fitted, free sums": BakeOptions(FITTED, fit=FitOptions(is_consistent=False)),
}
"""Besides every method at its own placement."""

GOALS = (Goal(35.0, 5.0), Goal(40.0, 5.0), Goal(45.0))
BOOTSTRAP_DRAWS = 1000

Results = dict[str, dict[int, np.ndarray]]
"""Method -> budget -> PSNR of each evaluation picture in dB."""


def main() -> None:
    """Measure every method at every budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("standin", nargs="?", default="flux")
    arguments = parser.parse_args()
    checkpoint = stages.find_model(f"standin/{arguments.standin}")
    size = stages.picture_size(checkpoint, None, None)
    with tempfile.TemporaryDirectory() as work:
        recording = RecordOptions(
            size=size, prompts=stages.default_prompts(checkpoint), samples=SAMPLES
        )
        trajectories = stages.record_pipeline(
            checkpoint, Path(work) / "calibration", recording, note=_note, report=lambda *_: None
        )
        exporting = stages.ExportOptions(size=size)
        bundle = stages.export(
            checkpoint, Path(work) / "standin.mcb", exporting, note=_note, is_forced=False
        )
        with (
            Pipeline(bundle, threads=1) as pipeline,
            engine_field(pipeline, trajectories) as field,
        ):
            schedules = dict(_methods(trajectories, field))
            results = _measure(
                _Gallery(pipeline, trajectories, "evaluation", Path(work)), schedules
            )
            held_out = _Gallery(pipeline, trajectories, "heldout", Path(work))
            goals = [_keep(goal, trajectories, field, held_out) for goal in GOALS]
    record = _record(results, schedules[FITTED], arguments.standin) | {"goals": goals}
    path = (
        Path(__file__).parents[2] / "docs" / "proof" / f"fitted-schedules-{arguments.standin}.json"
    )
    path.write_text(json.dumps(record, indent=1) + "\n")
    _print(results)
    _print_goals(goals)


def _methods(
    trajectories: Trajectories, field: VelocityField
) -> Iterator[tuple[str, list[Schedule]]]:
    """Every method's name and its schedules, one a budget."""
    named = {method: BakeOptions(method) for method in bakeable_methods()}
    for name, options in (named | VARIANTS).items():
        _note(name)
        network = field if options.method == FITTED else None
        yield name, list(bake_schedules(trajectories, BUDGETS, options, network))
    _note("official, best of 12")
    with judging(trajectories, field) as judge:
        yield "official, best of 12", _best_official(trajectories, judge)


def _best_official(trajectories: Trajectories, judge: Judge) -> list[Schedule]:
    """By the mean PSNR of the calibration samples, which is what is compared in the end."""
    tried = [bake_schedules(trajectories, BUDGETS, options) for options in OFFICIAL]
    best = []
    for of_budget in zip(*tried, strict=True):
        distinct = {(schedule.nodes, schedule.spans): schedule for schedule in of_budget}
        best.append(
            max(
                distinct.values(),
                key=lambda found: float(judge.follow(found.nodes, found.weights).psnr.mean()),
            )
        )
    return best


class _Gallery:
    """Pictures of one split's prompts by any schedule, and their PSNR."""

    def __init__(
        self, pipeline: Pipeline, trajectories: Trajectories, split: standins.Split, work: Path
    ) -> None:
        name = Path(pipeline.bundle.export.model.name).name
        texts = standins.prompts(split, name)[:PROMPTS]
        self._prompts = [Prompt(text, seed=1000 + index) for index, text in enumerate(texts)]
        self._renderer = EngineRenderer(
            pipeline,
            pipeline.resolution(),
            work,
            guidance_scale=trajectories.settings.guidance_scale,
            batch=BATCH,
        )
        grid = trajectories.grid
        self._full = self._pictures(bake("euler", grid, range(grid.steps)))

    def psnr(self, schedule: Schedule) -> np.ndarray:
        """Of each picture, in dB."""
        return psnr(self._pictures(schedule), self._full)

    def _pictures(self, schedule: Schedule) -> np.ndarray:
        render = self._renderer.open(schedule)
        batches = [self._prompts[first : first + BATCH] for first in range(0, PROMPTS, BATCH)]
        return np.concatenate([render(batch).pictures for batch in batches])


def _measure(gallery: _Gallery, schedules: dict[str, list[Schedule]]) -> Results:
    results: Results = {}
    for name, baked in schedules.items():
        _note(f"rendering {name}")
        results[name] = {
            budget: gallery.psnr(schedule) for budget, schedule in zip(BUDGETS, baked, strict=True)
        }
    return results


def _keep(
    goal: Goal, trajectories: Trajectories, field: VelocityField, gallery: _Gallery
) -> dict[str, object]:
    """Bake for a goal and count in how many resamplings of untouched prompts it holds."""
    _note(goal.describe())
    schedule, tried = bake_for_goal(trajectories, goal, None, field)
    values = gallery.psnr(schedule)
    rng = np.random.default_rng(1)
    drawn = values[rng.integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))]
    if goal.percentile is None:
        statistics = drawn.mean(axis=1)
    else:
        statistics = np.percentile(drawn, goal.percentile, axis=1)
    assert schedule.calibration is not None
    assert schedule.calibration.target is not None
    return {
        "goal": goal.describe(),
        "budget": schedule.budget,
        "tried": [each.budget for each in tried],
        "confidence": schedule.calibration.target.confidence,
        "held_out_db": _summary(values),
        "held_in_draws": float((statistics >= goal.psnr).mean()),
    }


def _record(results: Results, fitted: list[Schedule], standin: str) -> dict[str, object]:
    return {
        "standin": standin,
        "budgets": BUDGETS,
        "samples": SAMPLES,
        "prompts": PROMPTS,
        "psnr_db": {
            name: {budget: _summary(values) for budget, values in row.items()}
            for name, row in results.items()
        },
        "fitted_ahead_db": {
            name: {budget: _ahead(results, name, budget) for budget in BUDGETS}
            for name in results
            if name != FITTED
        },
        "calibration": {
            schedule.budget: {
                "gamma": schedule.calibration.gamma,
                "nodes": schedule.nodes,
                "held_out_psnr_db": fidelity.psnr.mean,
                "network_evaluations": schedule.calibration.network_evaluations,
                "candidates": schedule.calibration.candidates,
            }
            for schedule in fitted
            if schedule.calibration and (fidelity := schedule.calibration.fidelity)
        },
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    found = summarize(values)
    return {"mean": found.mean, "p5": found.p5, "worst": found.worst}


def _ahead(results: Results, name: str, budget: int) -> dict[str, float | None]:
    """How far fitted schedules are ahead on the same pictures, and the standard error."""
    found = paired_difference(results[FITTED][budget], results[name][budget])
    return {"mean": found.mean, "standard_error": found.standard_error}


def _print(results: Results) -> None:
    columns = "".join(f"{budget:>16}" for budget in BUDGETS)
    print(f"{'PSNR, dB: mean/p5/worst':26}{columns}")
    for name, row in results.items():
        cells = [_summary(row[budget]).values() for budget in BUDGETS]
        print(f"{name:26}" + "".join(f"{'/'.join(f'{v:.1f}' for v in c):>16}" for c in cells))
    print(f"\n{'fitted ahead by, ± s.e.':26}{columns}")
    for name in results:
        gaps = [_ahead(results, name, budget).values() for budget in BUDGETS]
        cells = [f"{mean:+.1f} ± {error:.1f}" for mean, error in gaps]
        print(f"{name:26}" + "".join(f"{cell:>16}" for cell in cells))


def _print_goals(goals: list[dict[str, object]]) -> None:
    for found in goals:
        print(
            f"\n{found['goal']}: {found['budget']} evaluations, sure to {found['confidence']:.2f}; "
            f"untouched prompts hold it in {found['held_in_draws']:.0%} of {BOOTSTRAP_DRAWS} draws"
        )


def _note(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
