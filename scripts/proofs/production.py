"""Batch rendering: nothing lost to kills and bad disks, throughput, memory, latency, fuzzing.

    scripts/prove production [--parts kills processes …] [--jobs 500] [--kills 25] [--rounds 5]

Each part goes into docs/proof/production.json; parts that were not run stay as they were there.
Times are taken in one run, alternating between what is compared; only their ratios travel.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec
from scripts.production.disk import disk_faults
from scripts.production.inputs import mid_size_bundle, standin_bundle, write_jobs
from scripts.production.kills import (
    Inputs,
    Undisturbed,
    killed_processes,
    killed_run,
    undisturbed_run,
)
from scripts.production.memory import resident_memory
from scripts.production.outcome import faults_of
from scripts.production.throughput import (
    against_denoising,
    against_plain_loop,
    batch_gains,
    first_picture_s,
)

from meancache_trt.evaluate.machine import describe_machine

_ROOT = Path(__file__).parents[2]
_TARGET = _ROOT / "docs" / "proof" / "production.json"

AGAINST_PLAIN, AGAINST_DENOISING, MEMORY_DEVIATION, PREDICTION = 1.25, 0.95, 0.05, 0.1
"""What a run and a renderer are to keep: at least the first two, at most the others."""

MID_SIZE_JOBS = {"b10": 64, "b25": 32}
"""On the mid-size model decoding takes as long as half an evaluation, on the same two cores: at ten
evaluations that alone is 5 %, so they dominate at 25, where `AGAINST_DENOISING` is asked for."""


@dataclass(frozen=True)
class Study:
    """The parts, and what they share."""

    work: Path
    options: argparse.Namespace

    @cached_property
    def bundle(self) -> Path:
        """The FLUX stand-in."""
        return standin_bundle(self.work / "flux.mcb")

    @cached_property
    def inputs(self) -> Inputs:
        """Jobs of two schedules, whose processes keep encoded prompts in one cache."""
        count = self.options.jobs
        jobs = write_jobs(self.work / "jobs.jsonl", count, ["b6", "b10"])
        return Inputs(self.bundle, jobs, count, ("--cache", self.work / "prompts"))

    @cached_property
    def undisturbed(self) -> Undisturbed:
        """What the others are compared with."""
        return undisturbed_run(self.inputs, self.work / "undisturbed")

    def parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """All of them by name, in order."""
        return {
            "kills": self._kills,
            "processes": self._processes,
            "ray": self._ray,
            "disk": lambda: disk_faults(self.bundle, self._folder("disk"), 60),
            "throughput": self._throughput,
            "memory": self._memory,
            "latency": self._latency,
            "fuzz": self._fuzz,
        }

    def _kills(self) -> dict[str, Any]:
        output = self.work / "killed"
        return killed_run(self.inputs, output, self.undisturbed, kills=self.options.kills)

    def _processes(self) -> dict[str, Any]:
        output = self.work / "processes"
        return killed_processes(self.inputs, output, self.undisturbed, kills=self.options.kills)

    def _ray(self) -> dict[str, Any]:
        _expect("ray_kills")
        from scripts.production.ray_kills import ray_with_kills  # noqa: PLC0415  starts Ray

        output, kills = self.work / "ray", max(self.options.kills // 5, 1)
        found = ray_with_kills(self.bundle, self.inputs.jobs, output, kills)
        return {**found, "faults": faults_of(output, self.inputs.jobs, self.undisturbed.pictures)}

    def _throughput(self) -> dict[str, Any]:
        rounds = self.options.rounds
        plain = against_plain_loop(self.bundle, self._folder("plain"), jobs=128, rounds=rounds)
        mid_size = mid_size_bundle(self.work / "mid-size.mcb")
        denoising = {
            name: against_denoising(mid_size, self._folder(name), name, jobs=count, rounds=rounds)
            for name, count in MID_SIZE_JOBS.items()
        }
        share = denoising["b25"]["share"]
        work = self._folder("first")
        checks = {
            f"{plain['ratio']:.2f} times the plain loop": plain["ratio"] >= AGAINST_PLAIN,
            f"{share:.1%} denoising": share >= AGAINST_DENOISING,
            f"{plain['differing_pictures']} pictures differ": not plain["differing_pictures"],
        }
        return {
            "against_plain_loop": plain,
            "against_denoising": denoising,
            "picture_ms_by_batch": batch_gains(self.bundle, work),
            "first_picture_s": first_picture_s(self.bundle, work, rounds=rounds),
            "faults": [told for told, is_fine in checks.items() if not is_fine],
        }

    def _memory(self) -> dict[str, Any]:
        found = resident_memory(self.bundle, self._folder("memory"), jobs=self.options.memory_jobs)
        is_flat = found["deviation"] <= MEMORY_DEVIATION
        return {**found, "faults": [] if is_flat else [f"it moves by {found['deviation']:.1%}"]}

    def _latency(self) -> dict[str, Any]:
        found = _module("latency", str(self.bundle))
        ratios = [row["ratio"] for row in found["predictions"]]
        lost = sum(row["lost"] for row in found["loads"])
        faults = [f"{lost} jobs were lost"] if lost else []
        faults += [f"measured / foretold is {r:.3f}" for r in ratios if abs(r - 1) > PREDICTION]
        return {**found, "faults": faults}

    def _fuzz(self) -> dict[str, Any]:
        _expect("fuzz_jobs")
        from scripts.production.fuzz_jobs import fuzz  # noqa: PLC0415  with the others of its kind

        lines = dict(fuzz(self.options.lines, seed=0))
        requests = _module("fuzz_http", str(self.bundle), "--requests", str(self.options.requests))
        return {"job_lines": lines, "http": requests, "faults": requests.get("faults", [])}

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        folder.mkdir()
        return folder


class NotThereError(Exception):
    """A part whose script is missing."""


def main() -> None:
    """Run all parts, or those that are named, and add them to the record."""
    record = json.loads(_TARGET.read_text(encoding="utf-8")) if _TARGET.exists() else {}
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        study = Study(Path(work), _options())
        parts = study.parts()
        for name in study.options.parts or parts:
            start = time.perf_counter()
            try:
                found = parts[name]()
            except NotThereError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            seconds = round(time.perf_counter() - start, 1)
            record["machine"] = msgspec.to_builtins(describe_machine())
            record[name] = {"part_s": seconds, **found}
            _TARGET.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(f"{name}, {seconds} s", *_table(found), sep="\n  ", flush=True)
            faults += [f"{name}: {fault}" for fault in found["faults"]]
    sys.exit("\n".join(faults) or 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", help="measure only these members of the record")
    parser.add_argument("--jobs", type=int, default=500, help="of the runs that are killed")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions of each")
    parser.add_argument("--memory-jobs", type=int, default=2000)
    parser.add_argument("--lines", type=int, default=10_000, help="fuzzed job lines")
    parser.add_argument("--requests", type=int, default=2_000, help="fuzzed HTTP requests")
    return parser.parse_args()


def _module(name: str, *arguments: str) -> dict[str, Any]:
    """What a script of `scripts/production` prints as JSON, in a process of its own."""
    _expect(name)
    command = [sys.executable, "-m", f"scripts.production.{name}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=_ROOT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _expect(name: str) -> None:
    if importlib.util.find_spec(f"scripts.production.{name}") is None:
        raise NotThereError(f"there is no scripts/production/{name}.py")


def _table(found: object, name: str = "") -> Iterator[str]:
    """A line for each value, named by its path."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _table(value, f"{name} {key}".strip())
    elif isinstance(found, list) and any(isinstance(value, dict) for value in found):
        for index, value in enumerate(found):
            yield from _table(value, f"{name} {index}")
    elif isinstance(found, float):
        yield f"{name}: {found:.4g}"
    elif found != []:
        yield f"{name}: {found}"


if __name__ == "__main__":
    main()
