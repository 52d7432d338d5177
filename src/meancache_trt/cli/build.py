"""`build`, and one of its stages as a command of its own: `export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import BakeOptions
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.cli import calibrating, exporting, options, planning, sizes
from meancache_trt.cli.calibrating import Calibrating
from meancache_trt.cli.exporting import Exporting
from meancache_trt.cli.inspect import inspect_bundle, print_schedules, schedule_facts
from meancache_trt.cli.output import hush_libraries, note, print_json, progress, transient_progress
from meancache_trt.cli.sizes import Sizes
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.measured import measure
from meancache_trt.plan import plan
from meancache_trt.plan_targets import PlanOptions, Target, find_targets
from meancache_trt.record import RecordOptions
from meancache_trt.shapes import Range

_output = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The bundle to make."
)


@click.command()
@options.model
@options.loras
@_output
@sizes.options
@options.batch
@options.text_tokens
@calibrating.options_of_build
@exporting.options
@options.backend
@options.threads
@planning.options
@options.force
@options.as_json
def build(
    model: str,
    loras: tuple[str, ...],
    output: Path,
    sizes: Sizes,
    batch: Range | None,
    text_tokens: int | None,
    calibrating: Calibrating,
    exporting: Exporting,
    backend: str,
    threads: int,
    planning: PlanOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Make a bundle from a diffusers checkpoint: export, calibrate, bake, plan.

    MODEL is a diffusers folder, a hub id, or standin/flux, standin/qwen_image or
    standin/hunyuan_video, small models that come with the package. Stages that are finished are not
    done again. What is recorded for calibration goes to OUTPUT.calibration beside the bundle and
    can be deleted afterwards.

    Of several resolutions the first is calibrated; the command again, with another one first, adds
    schedules for that one, called bN-WIDTHxHEIGHT.
    """
    wanted = calibrating.wanted(stages.DEFAULT_BUDGETS)
    reasons: list[str] = []
    targets = find_targets(backend, planning, note=reasons.append)
    hush_libraries()
    checkpoint = stages.find_model(model, loras)
    asked = sizes.of(checkpoint, None if force else output)
    recording = calibrating.recording(checkpoint, asked[0], text_tokens, wanted)
    exported = exporting.of(asked, batch, text_tokens)
    bundle = stages.export(checkpoint, output, exported, note=note, is_forced=force)
    _plan(bundle, targets, planning, reasons, is_forced=force)
    recording = replace(
        recording,
        text_tokens=bundle.export.text_tokens,
        guidance_scale_2=bundle.export.second_guidance_scale,
    )
    work = stages.calibration_directory(bundle, checkpoint, exported)
    trajectories = _record(checkpoint, work, recording, is_forced=force)
    stages.bake_into(
        bundle,
        trajectories,
        wanted,
        BakeOptions(method=calibrating.method),
        backend=backend,
        threads=threads,
        note=note,
    )
    measure(bundle, backend=backend, threads=threads)
    report_schedules(bundle, as_json=as_json)


@click.command()
@options.model
@options.loras
@_output
@sizes.options
@options.batch
@options.text_tokens
@exporting.options
@options.force
@options.as_json
def export(
    model: str,
    loras: tuple[str, ...],
    output: Path,
    sizes: Sizes,
    batch: Range | None,
    text_tokens: int | None,
    exporting: Exporting,
    force: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint's graphs into a new bundle and compare them with diffusers.

    Where OUTPUT is a bundle of MODEL, resolutions that it does not list are added to it: its graphs
    serve them all and stay as they are.
    """
    hush_libraries()
    checkpoint = stages.find_model(model, loras)
    exported = exporting.of(sizes.of(checkpoint, None if force else output), batch, text_tokens)
    bundle = stages.export(checkpoint, output, exported, note=note, is_forced=force)
    inspect_bundle(bundle, as_json=as_json)


def _plan(
    bundle: Bundle,
    targets: Sequence[Target],
    planning: PlanOptions,
    reasons: Sequence[str],
    *,
    is_forced: bool,
) -> None:
    """Build plans; `reasons` say why there are no more targets."""
    for reason in reasons:
        note(reason)
    plan([bundle], targets, planning, note=note, progress=transient_progress, is_forced=is_forced)


def _record(
    checkpoint: Checkpoint, directory: Path, recording: RecordOptions, *, is_forced: bool
) -> Trajectories:
    with progress("calibrate") as report:
        return stages.record_pipeline(
            checkpoint, directory, recording, note=note, report=report, is_forced=is_forced
        )


def report_schedules(bundle: Bundle, *, as_json: bool) -> None:
    """Print the schedules of a bundle that was just built."""
    schedules = [bundle.schedule(name) for name in bundle.schedule_names()]
    if as_json:
        facts = [schedule_facts(schedule) for schedule in schedules]
        print_json(
            {
                "bundle": str(bundle.directory),
                "bundle_id": bundle.manifest.bundle_id,
                "schedules": facts,
            }
        )
        return
    print_schedules(schedules)
    note(f"built {bundle.directory}")
