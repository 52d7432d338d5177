"""What the machine is, and whether each TensorRT makes and loads a plan on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import msgspec
from scripts.gpu import record
from scripts.gpu.bench import Bench
from scripts.gpu.record import Check

from meancache_trt.doctor import examine

NAME = "facts"
ABOUT = "driver, GPU, libraries, and a tiny plan built and loaded by each TensorRT"
_PLAN_LIMIT_S = 120.0  # a tiny plan takes seconds; the data-centre library loads for some more


def run(bench: Bench) -> Iterator[Check]:
    """`doctor`, `nvidia-smi`, and a plan of a tiny network by each flavour."""
    report = examine()
    yield _said("doctor", msgspec.json.encode(report).decode())
    yield _said("nvidia-smi", _nvidia_smi())
    yield from bench.settings.absent
    for flavour in report.flavours:
        if flavour.problem is not None:
            found = [record.skipped("tiny plan", flavour.problem)]
            yield msgspec.structs.replace(found[0], backend=flavour.name)
            continue
        is_targeted = bool(flavour.gpus) and flavour.gpus["0"].is_usable
        yield from bench.attempt(
            "tiny plan",
            lambda name=flavour.name, fits=is_targeted: _tiny_plan(name, is_targeted=fits),
            flavour.name,
            "",
        )


def _said(name: str, words: str) -> Check:
    return Check(name=name, verdict="measured", note=words)


def _nvidia_smi() -> str:
    query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it did not run: {error}"
    return (done.stdout or done.stderr).strip()


def _tiny_plan(flavour: str, *, is_targeted: bool) -> Check:
    """Build and load; where the flavour does not target this GPU, only note what it says."""
    command = [sys.executable, "-m", "scripts.gpu.tiny_plan", flavour]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_PLAN_LIMIT_S, check=False
    )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        said, is_loaded = f"the process ended: {words}", False
    else:
        answer = json.loads(done.stdout)
        said, is_loaded = answer["said"], answer["is_loaded"]
    if not is_targeted:
        return _said("tiny plan", f"there is no GPU that it builds for, and it says: {said}")
    verdict = record.equal("tiny plan", int(not is_loaded), reason="the GPU is a target")
    return msgspec.structs.replace(verdict, value=None, bound=None, note=said)
