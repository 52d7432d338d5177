"""`inspect`: what a bundle, a schedule file, a run or a picture holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.cli import options
from meancache_trt.cli.output import decibels, print_json, print_table, show_schedule
from meancache_trt.cli.plan_table import ListedPlan, list_plans, plan_facts, print_plans
from meancache_trt.cli.run_report import print_log
from meancache_trt.errors import PlanMismatchError
from meancache_trt.meancache.schedule import Schedule, load_schedule
from meancache_trt.measured import describe, measured_in
from meancache_trt.media.formats import OUTPUT_SUFFIXES
from meancache_trt.media.metadata import read_metadata
from meancache_trt.production.results import LOG
from meancache_trt.production.summary import summarize
from meancache_trt.selection import calibrated_size
from meancache_trt.shapes import Ranges


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Hash all weights and plans again.")
@options.as_json
def inspect(path: Path, verify: bool, as_json: bool) -> None:
    """Show what a bundle or a schedule file holds, how a run went, or how a picture was made.

    A run is the directory that `render --prompts` wrote, or its results.jsonl.
    """
    log = path if path.suffix == ".jsonl" else path / LOG
    if log.is_file():
        print_log(summarize(log), log, as_json=as_json)
        return
    if path.is_file() and path.name != MANIFEST:
        _inspect_file(path, as_json=as_json)
        return
    directory = path.parent if path.name == MANIFEST else path
    bundle = Bundle.open(directory, is_full_check=verify)
    plans = list_plans(bundle, is_full_check=verify)
    inspect_bundle(bundle, plans, as_json=as_json)
    unusable = [plan.problem for plan in plans if plan.problem is not None]
    if verify and unusable:  # said last: everything else renders without it
        raise PlanMismatchError("; ".join(unusable))


def _inspect_file(path: Path, *, as_json: bool) -> None:
    if path.suffix.lower() in OUTPUT_SUFFIXES:
        metadata = read_metadata(path)
        if as_json:
            print_json(metadata)
            return
        for name, value in metadata.items():
            click.echo(f"{name:16}{value}")
        return
    schedule = load_schedule(path)
    if as_json:
        print_json(schedule)
        return
    show_schedule(schedule)


def inspect_bundle(bundle: Bundle, plans: Sequence[ListedPlan] = (), *, as_json: bool) -> None:
    """Print what a bundle holds, and of its plans those that are given."""
    export = bundle.export
    schedules = [bundle.schedule(name) for name in bundle.schedule_names()]
    measured = measured_in(bundle)
    if as_json:
        facts = {
            "bundle_id": bundle.manifest.bundle_id,
            **msgspec.to_builtins(export),
            "ranges": export.ranges,
            "schedules": [schedule_facts(schedule) for schedule in schedules],
            "plans": [plan_facts(plan) for plan in plans],
            "measured": measured,
            "tools": bundle.manifest.tools,
        }
        print_json(facts)
        return
    click.echo(f"bundle      {bundle.directory}  ({bundle.manifest.bundle_id[:16]})")
    click.echo(f"family      {export.family}")
    click.echo(f"checkpoint  {export.model.name}  ({export.model.digest[:16]})")
    for lora in export.model.loras:
        click.echo(f"lora        {lora.name}  scale {lora.scale:g}  ({lora.sha256[:16]})")
    click.echo(f"resolutions {', '.join(map(str, export.sizes))}")
    click.echo(f"ranges      {_ranges(export.ranges)}")
    click.echo(f"guidance    {export.guidance.rule}, default {export.guidance.default_scale}")
    if export.second_stage is not None:
        click.echo(f"stage 2     transformer_2 {export.second_stage}")
    click.echo()
    print_table(
        ["component", "precision", "weights MB", "shared MB"],
        [
            [
                name,
                part.precision,
                f"{part.weight_bytes / 1e6:.2f}",
                f"{part.shared_bytes / 1e6:.2f}",
            ]
            for name, part in export.components.items()
        ],
    )
    click.echo()
    print_table(
        ["parity", "max abs error", "tolerance", "compared"],
        [
            [
                p.component,
                f"{p.max_abs_error:.1e}",
                f"{p.tolerance:.1e}",
                ", ".join(p.blocks) or "whole",
            ]
            for p in export.parity
        ],
    )
    click.echo()
    print_schedules(schedules)
    if plans:
        click.echo()
        print_plans(plans)
    for record in measured:
        click.echo()
        click.echo(f"measured    {describe(record)}")


def _ranges(ranges: Ranges) -> str:
    """Each range that there is, MIN/OPT/MAX."""
    named = msgspec.structs.asdict(ranges).items()
    return ", ".join(f"{name.replace('_', ' ')} {each}" for name, each in named if each)


def print_schedules(schedules: Sequence[Schedule]) -> None:
    """Print one line a schedule."""
    print_table(
        [
            *("schedule", "evaluations", "of", "method", "history"),
            *("guidance scale", "calibrated at", "in"),
            *("PSNR dB", "5 %", "worst", "SSIM", "Euler dB"),
        ],
        [
            [
                *(s.name, s.budget, s.grid.steps, s.method, s.history),
                *(_scale(s), _size(s) or "", s.precision if s.calibration else "", *_fidelity(s)),
            ]
            for s in schedules
        ],
    )


def _fidelity(schedule: Schedule) -> list[str]:
    """PSNR (mean, 5th percentile, worst) and SSIM of the samples, and Euler's PSNR."""
    evidence = schedule.calibration
    if evidence is None or evidence.fidelity is None:
        return [decibels(None)] * 5
    psnr, ssim = evidence.fidelity.psnr, evidence.fidelity.ssim
    euler = None if evidence.euler is None else evidence.euler.psnr.mean
    return [*map(decibels, (psnr.mean, psnr.p5, psnr.worst)), f"{ssim.mean:.4f}", decibels(euler)]


def _scale(schedule: Schedule) -> str:
    if schedule.guidance_range is not None:
        return "{:g} to {:g}".format(*schedule.guidance_range)
    return "any" if schedule.guidance_scale is None else str(schedule.guidance_scale)


def _size(schedule: Schedule) -> str | None:
    size = calibrated_size(schedule)
    return None if size is None else str(size)


def schedule_facts(schedule: Schedule) -> dict[str, object]:
    """What `--json` says of a schedule in a list."""
    return {
        "name": schedule.name,
        "budget": schedule.budget,
        "steps": schedule.grid.steps,
        "method": schedule.method,
        "history": schedule.history,
        "transformers": schedule.transformers(),
        "guidance_scale": schedule.guidance_scale,
        "guidance_range": schedule.guidance_range,
        "calibrated_at": _size(schedule),
        "precision": None if schedule.calibration is None else schedule.precision,
        "calibration": schedule.calibration,
    }
