"""Fitted schedules against every other method: the measurement behind `calibration.fitted`.

On the FLUX stand-in: 16 recorded samples of calibration prompts, 32 evaluation prompts rendered by
the engine, PSNR against the model's own 50 steps, guidance scale 3.5. The official schedule is the
best of 12 by the same error on the same calibration samples that chooses a fitted one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.calibration.baking import BakeOptions, bake_schedules
from meancache_trt.calibration.fitted import mean_error
from meancache_trt.calibration.metrics import psnr
from meancache_trt.calibration.sequential_fit import FitOptions
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.engine_field import engine_field
from meancache_trt.meancache.methods.threshold import fill_gaps
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.schedule import FITTED, Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from meancache_trt.session import Session

BUDGETS = (5, 6, 8, 10, 12, 15, 20, 25)
SAMPLES, PROMPTS, BATCH = 16, 32, 16
GUIDANCE_SCALE = 3.5
OFFICIAL = [
    BakeOptions("official", scaling=scaling, gamma=gamma, max_span=span, is_refitted=is_refitted)
    for scaling, is_refitted in (("displacement", True), ("relative", False))
    for gamma in (2.0, 3.0, 4.0)
    for span in (3, 6)
]
FITS = {
    "fitted": FitOptions(),
    "fitted, free sums": FitOptions(is_consistent=False),
}

Results = dict[str, dict[int, np.ndarray]]
"""Method -> budget -> PSNR of each evaluation picture in dB."""


def main() -> None:
    """Measure every method at every budget."""
    checkpoint = stages.find_model("standin/flux")
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
            checkpoint, Path(work) / "flux.mcb", exporting, note=_note, is_forced=False
        )
        with (
            Pipeline(bundle, threads=1) as pipeline,
            engine_field(pipeline, trajectories, batch=BATCH) as field,
        ):
            schedules = dict(_methods(pipeline, trajectories, field))
            results = _measure(pipeline, trajectories, schedules)
    path = Path(__file__).parents[2] / "docs" / "proof" / "fitted-schedules.json"
    path.write_text(json.dumps(_record(results, schedules["fitted"]), indent=1) + "\n")
    _print(results)


def _methods(
    pipeline: Pipeline, trajectories: Trajectories, field: VelocityField
) -> Iterator[tuple[str, list[Schedule]]]:
    """Every method's name and its schedules, one a budget."""
    grid = trajectories.grid

    def each(make: Callable[[int], Schedule]) -> list[Schedule]:
        return [make(budget) for budget in BUDGETS]

    def even(method: str) -> list[Schedule]:
        return each(lambda budget: bake(method, grid, fill_gaps((0,), budget, grid.steps)))

    def own(method: str) -> list[Schedule]:
        return each(lambda budget: bake(method, pipeline.grid(budget), range(budget)))

    calibrated = bake_schedules(trajectories, BUDGETS, BakeOptions("euler"))
    yield "euler, own grid", own("euler")
    yield "euler, calibrated nodes", list(calibrated)
    yield "ab2, own grid", own("ab2")
    yield "ab2, calibrated nodes", [bake("ab2", grid, schedule.nodes) for schedule in calibrated]
    yield "taylor1, even nodes", even("taylor1")
    yield "threshold", list(bake_schedules(trajectories, BUDGETS, BakeOptions("threshold")))
    _note("official, best of 12")
    yield "official, best of 12", _best_official(trajectories, field)
    for name, fit in FITS.items():
        _note(name)
        options = BakeOptions(FITTED, fit=fit)
        yield name, list(bake_schedules(trajectories, BUDGETS, options, field))


def _best_official(trajectories: Trajectories, field: VelocityField) -> list[Schedule]:
    tried = [bake_schedules(trajectories, BUDGETS, options) for options in OFFICIAL]
    best = []
    for of_budget in zip(*tried, strict=True):
        distinct = {(schedule.nodes, schedule.spans): schedule for schedule in of_budget}
        best.append(
            min(
                distinct.values(),
                key=lambda schedule: mean_error(_final_errors(trajectories, field, schedule)),
            )
        )
    return best


def _final_errors(
    trajectories: Trajectories, field: VelocityField, schedule: Schedule
) -> np.ndarray:
    """Distances from the recorded final latents, as fractions of these; all samples in memory."""
    samples = list(trajectories)
    prompts, latents = [s.prompt for s in samples], np.stack([s.initial for s in samples])
    final = np.stack([s.final for s in samples])
    past: list[np.ndarray] = []
    for node, weights in zip(schedule.nodes, schedule.weights, strict=True):
        past.insert(0, field(prompts, latents, node))
        moved = sum(weight * velocity for weight, velocity in zip(weights, past, strict=False))
        latents = (latents + moved).astype(np.float32)
    return np.asarray(np.linalg.norm(latents - final, axis=1) / np.linalg.norm(final, axis=1))


def _measure(
    pipeline: Pipeline, trajectories: Trajectories, schedules: dict[str, list[Schedule]]
) -> Results:
    conditioning = pipeline.encode(standins.prompts("evaluation")[:PROMPTS]).tensors
    shape = pipeline.resolution().noise_shape
    noise = np.stack([philox_normal(1000 + index, shape) for index in range(PROMPTS)])

    def pictures(schedule: Schedule) -> np.ndarray:
        checked = pipeline.schedule(schedule, GUIDANCE_SCALE)
        session = Session(pipeline.graphs, checked, pipeline.resolution(), batch=BATCH)
        batches = []
        for first in range(0, PROMPTS, BATCH):
            chosen = slice(first, first + BATCH)
            fed = {name: tensor[chosen] for name, tensor in conditioning.items()}
            batches.append(session.run(noise[chosen], fed, GUIDANCE_SCALE).pictures)
        return np.concatenate(batches)

    full = pictures(bake("euler", trajectories.grid, range(trajectories.grid.steps)))
    results: Results = {}
    for name, baked in schedules.items():
        _note(f"rendering {name}")
        results[name] = {
            budget: psnr(pictures(schedule), full)
            for budget, schedule in zip(BUDGETS, baked, strict=True)
        }
    return results


def _record(results: Results, fitted: list[Schedule]) -> dict[str, object]:
    return {
        "budgets": BUDGETS,
        "samples": SAMPLES,
        "prompts": PROMPTS,
        "psnr_db": {
            name: {budget: _summary(values) for budget, values in row.items()}
            for name, row in results.items()
        },
        "fitted_ahead_db": {
            name: {budget: _paired(results["fitted"][budget], row[budget]) for budget in BUDGETS}
            for name, row in results.items()
            if name != "fitted"
        },
        "calibration": {
            schedule.budget: {
                "gamma": schedule.calibration.gamma,
                "nodes": schedule.nodes,
                "held_out_error": schedule.calibration.held_out_error,
                "network_evaluations": schedule.calibration.network_evaluations,
            }
            for schedule in fitted
            if schedule.calibration
        },
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "p5": float(np.percentile(values, 5)),
        "worst": float(values.min()),
    }


def _paired(values: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Mean difference over the same pictures, and its standard error."""
    gaps = values - others
    return {
        "mean": float(gaps.mean()),
        "standard_error": float(gaps.std(ddof=1) / np.sqrt(len(gaps))),
    }


def _print(results: Results) -> None:
    columns = "".join(f"{budget:>16}" for budget in BUDGETS)
    print(f"{'PSNR, dB: mean/p5/worst':26}{columns}")
    for name, row in results.items():
        cells = [_summary(row[budget]).values() for budget in BUDGETS]
        print(f"{name:26}" + "".join(f"{'/'.join(f'{v:.1f}' for v in c):>16}" for c in cells))
    print(f"\n{'fitted ahead by, ± s.e.':26}{columns}")
    for name in results:
        gaps = [_paired(results["fitted"][b], results[name][b]).values() for b in BUDGETS]
        cells = [f"{mean:+.1f} ± {error:.1f}" for mean, error in gaps]
        print(f"{name:26}" + "".join(f"{cell:>16}" for cell in cells))


def _note(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
