"""Which way of choosing nodes and spans is best: the measurement behind `calibration.baking`.

On the FLUX stand-in: 16 recorded samples of calibration prompts, 16 evaluation prompts rendered by
the engine, PSNR against the model's own 50 steps, guidance scale 3.5.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.calibration.baking import BakeOptions, bake_schedules
from meancache_trt.calibration.metrics import PsnrSummary, compare
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.meancache.methods.threshold import fill_gaps
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Conditioning, Pipeline

BUDGETS = (25, 20, 15, 12, 10, 8, 6, 5)
SAMPLES = 16
VARIANTS = {
    "defaults": BakeOptions("official"),
    "not refitted": BakeOptions("official", is_refitted=False),
    "relative costs": BakeOptions("official", scaling="relative"),
    "l1 norm": BakeOptions("official", norm="l1"),
    "gamma 2": BakeOptions("official", gamma=2.0),
    "gamma 4": BakeOptions("official", gamma=4.0),
    "spans to 2": BakeOptions("official", max_span=2),
    "spans to 6": BakeOptions("official", max_span=6),
    "paper": BakeOptions("paper"),
    "euler": BakeOptions("euler"),
    "threshold": BakeOptions("threshold"),
}


def main() -> None:
    """Measure every variant at every budget."""
    checkpoint = stages.find_model("standin/flux")
    size = stages.picture_size(checkpoint, None, None)
    with tempfile.TemporaryDirectory() as work:
        recording = RecordOptions(size=size, prompts=stages.default_prompts(checkpoint))
        trajectories = stages.record_pipeline(
            checkpoint, Path(work) / "calibration", recording, note=_note, report=lambda *_: None
        )
        bundle = stages.export(
            checkpoint,
            Path(work) / "flux.mcb",
            stages.ExportOptions(size=size),
            note=_note,
            is_forced=False,
        )
        with Pipeline(bundle) as pipeline:
            results = _measure(pipeline, trajectories)
    record = {"budgets": BUDGETS, "samples": SAMPLES, "psnr_db": results}
    path = Path(__file__).parents[2] / "docs" / "proof" / "calibration-defaults.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    _print(results)


def _measure(
    pipeline: Pipeline, trajectories: Trajectories
) -> dict[str, dict[int, dict[str, float]]]:
    prompts = pipeline.encode(standins.prompts("evaluation")[:SAMPLES])
    full = _pictures(pipeline, prompts, bake("euler", trajectories.grid, range(50)))
    schedules = {
        name: bake_schedules(trajectories, BUDGETS, options) for name, options in VARIANTS.items()
    }
    schedules["euler, evenly spaced"] = tuple(
        bake("euler", trajectories.grid, fill_gaps((0,), budget, trajectories.grid.steps))
        for budget in BUDGETS
    )
    results: dict[str, dict[int, dict[str, float]]] = {}
    for name, baked in schedules.items():
        _note(name)
        results[name] = {
            schedule.budget: _summary(_pictures(pipeline, prompts, schedule), full)
            for schedule in baked
        }
    return results


def _pictures(pipeline: Pipeline, prompts: Conditioning, schedule: Schedule) -> np.ndarray:
    seeds = list(range(1000, 1000 + len(prompts.prompts)))
    renderings = pipeline.render(prompts, seed=seeds, schedule=schedule, guidance_scale=3.5)
    return np.stack([rendering.pixels for rendering in renderings])


def _summary(pictures: np.ndarray, references: np.ndarray) -> dict[str, float]:
    summary = compare(pictures, references)
    assert isinstance(summary, PsnrSummary)
    return {"mean": summary.mean, "p5": summary.p5, "worst": summary.worst}


def _print(results: dict[str, dict[int, dict[str, float]]]) -> None:
    print(f"{'mean PSNR, dB':22}" + "".join(f"{budget:>7}" for budget in BUDGETS) + "   mean")
    for name, row in results.items():
        means = [row[budget]["mean"] for budget in BUDGETS]
        print(f"{name:22}" + "".join(f"{m:7.1f}" for m in means) + f"{np.mean(means):7.1f}")


def _note(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
