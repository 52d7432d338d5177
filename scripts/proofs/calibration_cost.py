"""Measures what a calibration of the FLUX.1 stand-in costs: evaluations, time, memory.

Time outside the network is that of a whole bake, from opened recordings to the schedule, less what
passes inside calls of the network and of its decoder. Memory is the peak of a process of its own
that records and bakes, with few samples and with many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meancache_trt import build as stages
from meancache_trt.calibration.baking import baking
from meancache_trt.calibration.fitted import DEFAULT_GAMMAS
from meancache_trt.calibration.pair_path import edge_limit, shortest_pair_path
from meancache_trt.calibration.refit import mean_gram
from meancache_trt.calibration.trajectories import Array, Prompt, Trajectories
from meancache_trt.calibration.two_term import peak_costs, two_term_edges
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.engine_field import engine_field
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline

BUDGET, SAMPLES, STEPS = 10, 16, 50
LONG_STEPS, LONG_SAMPLES = 200, 4


class TimedField:
    """A velocity field that counts the seconds inside it."""

    def __init__(self, field: VelocityField) -> None:
        self._field, self.seconds = field, 0.0
        self.batch = field.batch

    def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:
        """See `VelocityField`."""
        started = time.perf_counter()
        velocities = self._field(prompts, latents, step)
        self.seconds += time.perf_counter() - started
        return velocities

    def pictures(self, latents: Array) -> Array:
        """See `VelocityField`."""
        started = time.perf_counter()
        made = self._field.pictures(latents)
        self.seconds += time.perf_counter() - started
        return made


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=512, help="samples of the large calibration")
    many: int = parser.parse_args().many
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        record = {
            "bake": _bake(work),
            "solve": [_solve(_recorded(work, STEPS, SAMPLES)), _solve(_long(work))],
            "peak_memory_mb": {count: _peak_mb(work, count) for count in (SAMPLES, many)},
        }
    path = Path(__file__).parents[2] / "docs" / "proof" / "calibration-cost.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def _recorded(work: Path, steps: int, samples: int) -> Trajectories:
    checkpoint = stages.find_model("standin/flux")
    options = RecordOptions(
        size=stages.picture_size(checkpoint, None, None),
        prompts=stages.default_prompts(checkpoint),
        steps=steps,
        samples=samples,
    )
    return stages.record_pipeline(
        checkpoint, work / f"{steps}-{samples}", options, note=_note, report=lambda *_: None
    )


def _long(work: Path) -> Trajectories:
    return _recorded(work, LONG_STEPS, LONG_SAMPLES)


def _bake(work: Path) -> dict[str, object]:
    """One fitted schedule by the bundle's engine."""
    checkpoint = stages.find_model("standin/flux")
    options = stages.ExportOptions(size=stages.picture_size(checkpoint, None, None))
    bundle = stages.export(checkpoint, work / "flux.mcb", options, note=_note, is_forced=False)
    trajectories = _recorded(work, STEPS, SAMPLES)
    with (
        Pipeline(bundle, threads=1) as pipeline,
        engine_field(pipeline, trajectories) as field,
    ):
        warm_up(field, trajectories)
        timed = TimedField(field)
        started = time.perf_counter()
        with baking(trajectories, None, timed) as baker:
            evidence = baker.bake(BUDGET).schedule.calibration
        seconds = time.perf_counter() - started
    assert evidence is not None
    assert evidence.candidates is not None
    return {
        "budget": BUDGET,
        "samples": SAMPLES,
        "steps": STEPS,
        "network_evaluations": evidence.network_evaluations,
        "candidates": evidence.candidates,
        "evaluations_allowed": SAMPLES * STEPS + SAMPLES * BUDGET * evidence.candidates,
        "seconds_in_all": seconds,
        "seconds_outside_the_network": seconds - timed.seconds,
    }


def warm_up(field: VelocityField, trajectories: Trajectories) -> None:
    """Load graphs and encode prompts, which a bake does once whatever it bakes."""
    prompts = [sample.prompt for sample in trajectories.samples][: field.batch]
    latents = np.stack([trajectories.final(sample) for sample in range(len(prompts))])
    field(prompts, latents, 0)
    field(prompts[:1], latents[:1], 0)


def _solve(trajectories: Trajectories) -> dict[str, object]:
    """Edges, costs and paths of all candidates, and the paths alone."""
    steps, sigmas = trajectories.grid.steps, trajectories.grid.array()
    started = time.perf_counter()
    edges = two_term_edges(
        mean_gram(trajectories), sigmas, longest=edge_limit(steps, BUDGET), is_consistent=True
    )
    costs = peak_costs(trajectories, sigmas, edges, DEFAULT_GAMMAS)
    measured = time.perf_counter()
    for cost, gamma in zip(costs, DEFAULT_GAMMAS, strict=True):
        shortest_pair_path(cost, BUDGET, gamma)
    solved = time.perf_counter()
    return {
        "steps": steps,
        "samples": len(trajectories),
        "costs_seconds": measured - started,
        "paths_seconds": solved - measured,
    }


def _peak_mb(work: Path, samples: int) -> float:
    """Peak resident memory of `calibrate`, recording included."""
    _note(f"calibrating with {samples} samples")
    command = [
        *(sys.executable, "-m", "meancache_trt.cli", "calibrate", "standin/flux"),
        *("-o", str(work / f"peak-{samples}"), "--samples", str(samples)),
        *("--budget", str(BUDGET)),
    ]
    measure = (
        "import resource, subprocess, sys;"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", measure, *command], check=True, capture_output=True, text=True
    )
    return int(done.stdout) / 1024


def _note(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
