"""Step caching against every rival that can be run here, each by its own code, at equal work.

On a stand-in's evaluation prompts, in the same diffusers pipeline in float32 with the same seeds:
cache-dit, diffusers' own caches and solvers, and this project's schedules by its diffusers
scheduler. PSNR is against the pipeline's own 50 steps. A cached step of a block cache still runs a
part of the network, so work is counted: executed floating-point operations of matrix products, in
evaluations of the whole network. Beside each stands `fitted` with at most the same work.

    scripts/prove rivals                      # standin/flux
    scripts/prove rivals standin/qwen_image --prompts 8
    scripts/prove rivals --recorded --markdown

cache-dit is in the `rivals` extra (pip install -e '.[rivals]'); without it its rows say so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.rivals import block_caches, hooks, ours, solvers
from scripts.rivals.measure import FINE_STEPS, Blocks, blocks, measure, reference
from scripts.rivals.rival import Rival
from scripts.rivals.rows import Row, psnr_of, rows_of, summary
from scripts.rivals.subject import STEPS, load_subject
from scripts.rivals.table import closest_table, remarks, rows_table

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.meancache.schedule import FITTED, Schedule

TARGET = Path(__file__).parents[2] / "docs" / "proof" / "rivals.json"
MASKED_BUDGETS = (8, 12)
PACKAGES = ("cache-dit", "diffusers", "torch", "meancache-trt")


def main() -> None:
    """Measure the stand-ins that are named, or print what is recorded."""
    options = _options()
    torch.set_num_threads(1)
    record = json.loads(TARGET.read_text()) if TARGET.exists() else {"standins": {}}
    for name in [] if options.recorded else options.standins or ["standin/flux"]:
        record["standins"][name] = _prove(name, options.prompts)
        TARGET.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, proof in record["standins"].items():
        print(f"\n{name}\n\n{_report(proof, is_markdown=options.markdown)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("standins", nargs="*", metavar="STANDIN", help="as standin/flux")
    parser.add_argument("--prompts", type=int, default=16, help="evaluation prompts, 16")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--recorded", action="store_true", help="measure nothing")
    return parser.parse_args()


def _prove(name: str, prompts: int) -> dict[str, Any]:
    started = time.perf_counter()
    checkpoint = stages.find_model(name)
    texts = standins.prompts("evaluation", checkpoint.path.name)[:prompts]
    subject = load_subject(name, texts, stages.picture_size(checkpoint, None, None))
    subject.run(subject.prompts[0], steps=2)  # allocates, warms up
    with ours.calibration(subject, _note) as (trajectories, field):
        _note("baking")
        baked = ours.schedules(trajectories, field)
    _note("the pipeline's own steps")
    stock = reference(subject)
    measured = measure(subject, list(_rivals(trajectories, baked)), _note)
    rows = rows_of(measured, stock)
    return {
        "prompts": len(subject.prompts),
        "steps": STEPS,
        "guidance_scale": subject.call.guidance_scale,
        "packages": _versions(),
        "flops_per_evaluation": stock.runs[0].flops / STEPS,
        "transformer_calls_per_step": stock.runs[0].calls / STEPS,
        "blocks": [msgspec.to_builtins(of_kind) for of_kind in blocks(subject)],
        "stock_against_fine_db": msgspec.to_builtins(summary(psnr_of(stock.runs, stock.fine))),
        "fine_steps": FINE_STEPS,
        "seconds": round(time.perf_counter() - started),
        "rows": [_sparse(row) for row in rows],
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _rivals(trajectories: Trajectories, baked: dict[str, list[Schedule]]) -> Iterator[Rival]:
    nodes = {
        schedule.budget: schedule.nodes
        for schedule in baked[FITTED]
        if schedule.budget in MASKED_BUDGETS
    }
    yield from ours.rivals(baked)
    yield from solvers.rivals()
    yield from hooks.rivals([sample.prompt for sample in trajectories.samples])
    yield from block_caches.rivals(nodes)


def _sparse(row: Row) -> dict[str, Any]:
    """As JSON, without what is not there."""
    fields: dict[str, Any] = msgspec.to_builtins(row)
    return {key: value for key, value in fields.items() if value is not None}


def _report(proof: dict[str, Any], *, is_markdown: bool) -> str:
    rows = [msgspec.convert(row, Row) for row in proof["rows"]]
    kinds = [msgspec.convert(of_kind, Blocks) for of_kind in proof["blocks"]]
    largest = ours.FITTED_BUDGETS[-1]
    return "\n\n".join(
        [
            _what_it_says(proof, kinds),
            f"The setting of each method that comes closest to `fitted`, up to {largest}:",
            closest_table(rows, largest=largest, is_markdown=is_markdown),
            "All settings:",
            rows_table(rows, is_markdown=is_markdown),
            "In no table:",
            "\n".join(f"- {line}" for line in remarks(rows, largest=largest)) or "- nothing",
        ]
    )


def _what_it_says(proof: dict[str, Any], kinds: list[Blocks]) -> str:
    counts = " and ".join(f"{len(kind.shares)} {kind.name}" for kind in kinds)
    first = kinds[0].shares[0]
    steps, floor = proof["steps"], 5 + first * (proof["steps"] - 5)
    fine = f"{proof['stock_against_fine_db']['mean']:.1f} dB"
    return "\n".join(
        [
            f"{proof['prompts']} prompts, {steps} steps, guidance scale {proof['guidance_scale']}.",
            f"PSNR: mean / 5th percentile / worst against the pipeline's own {steps} steps.",
            f"{proof['fine_steps']} steps: mean against these, of which the {steps} have {fine}.",
            "work: executed matrix products, in evaluations of the network. time: of the denoising",
            "loop, against all steps. fitted ahead: paired mean in dB and its standard error.",
            f"The network has {counts}. The first takes {first:.1%} of an",
            "evaluation. FirstBlockCache and DBCache run it at every step, so that with 5 full",
            f"evaluations their work is at least {floor:.1f}. Networks with dozens of blocks leave",
            "them more to skip. In HunyuanVideo, DBCache runs the first block of either list.",
        ]
    )


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    main()
