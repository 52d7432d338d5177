"""Plans of the three stand-ins for two GPUs that are not here, by the command that a user types.

The first run builds all, the second reuses all, a changed option and a changed graph build exactly
what changed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.graph_change import change_graph

from meancache_trt.engine.tensorrt.library import load_library

STANDINS = ("flux", "qwen_image", "hunyuan_video")
CAPABILITIES = ("8.9", "12.0")
CHANGED_OPTION = ("--max-aux-streams", "1")
CHANGED_GRAPH = "update/h4"

_COMMAND = (sys.executable, "-m", "meancache_trt.cli")


def main() -> None:
    """Run all four and write what they took."""
    with tempfile.TemporaryDirectory() as work:
        bundles = [_exported(Path(work), name) for name in STANDINS]
        runs = {
            "first": _plan(bundles),
            "second": _plan(bundles),
            "changed option": _plan(bundles[:1], *CHANGED_OPTION),
        }
        change_graph(bundles[0], CHANGED_GRAPH)
        runs["changed graph"] = _plan(bundles)
    faults = _faults(runs)
    record = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU needed",
        "library": f"tensorrt_rtx {load_library('tensorrt_rtx').version}",
        "compute_capabilities": CAPABILITIES,
        "runs": {name: _counts(run) for name, run in runs.items()},
        "plans": {Path(run["bundle"]).stem: _rows(run) for run in runs["first"]["bundles"]},
        "faults": faults,
    }
    target = Path("docs/proof/plans.json")
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(_table(record))
    sys.exit("; ".join(faults) or 0)


def _exported(work: Path, name: str) -> Path:
    bundle = work / f"{name}.mcb"
    options = ("--precision", "bfloat16", "--skip-parity")
    command = [*_COMMAND, "export", f"standin/{name}", "-o", str(bundle), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return bundle


def _plan(bundles: list[Path], *options: str) -> dict[str, Any]:
    """What `plan --json` prints, and how long it took."""
    capabilities = ("--compute-capability", ",".join(CAPABILITIES))
    start = time.perf_counter()
    printed = subprocess.check_output(
        [*_COMMAND, "plan", *map(str, bundles), *capabilities, *options, "--json"]
    )
    found: dict[str, Any] = json.loads(printed)
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def _plans(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan for bundle in run["bundles"] for plan in bundle["plans"]]


def _counts(run: dict[str, Any]) -> dict[str, Any]:
    built = [plan for plan in _plans(run) if not plan["is_reused"]]
    return {
        "built": len(built),
        "reused": len(_plans(run)) - len(built),
        "built_components": sorted({plan["key"]["component"] for plan in built}),
        "seconds": run["seconds"],
    }


def _rows(bundle: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "component": plan["key"]["component"],
            "precision": plan["key"]["precision"],
            "compute_capability": plan["key"]["compute_capability"],
            "fused_attention": plan["fused_attention"],
            "megabytes": round(plan["file"]["size_bytes"] / 1e6, 2),
            "seconds": plan["build_s"],
        }
        for plan in bundle["plans"]
    ]


def _faults(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it must be."""
    first, second = _counts(runs["first"]), _counts(runs["second"])
    option, graph = _counts(runs["changed option"]), _counts(runs["changed graph"])
    unfused = [
        plan["key"]["compute_capability"]
        for plan in _plans(runs["first"])
        if plan["key"]["component"] == "transformer/bfloat16" and not plan["fused_attention"]
    ]
    checks = {
        "the first run reused something": first["reused"] == 0,
        "the second run built something": second["built"] == 0,
        "a changed option reused something": option["reused"] == 0,
        "a changed graph built something else": graph["built_components"] == [CHANGED_GRAPH],
        "a changed graph was not built for each GPU": graph["built"] == len(CAPABILITIES),
        "a transformer has no fused attention": not unfused,
    }
    return [fault for fault, is_fine in checks.items() if not is_fine]


def _table(record: dict[str, Any]) -> str:
    lines = ["| model | component | GPU | fused attention | MB | s |", "|---|---|---|---|---|---|"]
    for model, rows in record["plans"].items():
        lines += [
            f"| {model} | {row['component']} | {row['compute_capability']} | "
            f"{row['fused_attention']} | {row['megabytes']:.1f} | {row['seconds']:.1f} |"
            for row in rows
        ]
    for name, run in record["runs"].items():
        lines.append(f"{name}: {run['built']} built, {run['reused']} reused, {run['seconds']} s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
