"""`build`, and one of its stages as a command of its own: `export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click

from meancache_trt import build as stages
from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.calibration.baking import BakeOptions
from meancache_trt.calibration.target import Goal
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.cli import options, planning
from meancache_trt.cli.inspect import inspect_bundle, print_schedules, schedule_facts
from meancache_trt.cli.output import hush_libraries, note, print_json, progress, transient_progress
from meancache_trt.cli.render import read_prompts
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.measured import measure
from meancache_trt.plan import plan
from meancache_trt.plan_targets import PlanOptions, Target, find_targets
from meancache_trt.record import RecordOptions
from meancache_trt.shapes import PictureSize, Range

_weights = click.option(
    "--weights",
    type=click.Choice(["link", "copy"]),
    default="link",
    show_default=True,
    help="link: share the checkpoint's files; copy: a bundle that travels.",
)
_precision = click.option(
    "--precision",
    "precisions",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    multiple=True,
    help="Graphs beside the float32 one; may be given several times. By default bfloat16 where the "
    "checkpoint is stored so.",
)
_skip_parity = click.option(
    "--skip-parity", is_flag=True, help="Do not compare the graphs with diffusers."
)
_parity_memory = click.option(
    "--parity-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory that the comparison may take; by default what is free. A network that does not "
    "fit is compared by the first of each kind of block.",
)
_output = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The bundle to make."
)


@click.command()
@options.model
@_output
@options.resolutions
@options.height
@options.width
@options.frames
@options.batch
@options.text_tokens
@options.steps
@options.guidance_to_calibrate
@options.budgets
@options.target_psnr
@options.percentile
@options.confidence
@options.method
@options.samples
@options.prompts
@_weights
@_precision
@_skip_parity
@_parity_memory
@options.backend
@options.threads
@planning.options
@options.force
@options.as_json
def build(
    model: str,
    output: Path,
    resolutions: tuple[PictureSize, ...],
    height: int | None,
    width: int | None,
    frames: int | None,
    batch: Range | None,
    text_tokens: int | None,
    steps: int,
    guidance_scale: float | tuple[float, float] | None,
    budgets: tuple[tuple[int, ...], ...],
    target_psnr: float | None,
    percentile: float | None,
    confidence: float | None,
    method: str,
    samples: int,
    file: Path | None,
    weights: Literal["link", "copy"],
    precisions: tuple[str, ...],
    skip_parity: bool,
    parity_memory: float | None,
    backend: str,
    threads: int,
    planning: PlanOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Make a bundle from a diffusers checkpoint: export, calibrate, bake, plan.

    MODEL is a diffusers folder, a hub id, or standin/flux or standin/qwen_image, small models that
    come with the package. Stages that are finished are not done again. What is recorded for
    calibration goes to OUTPUT.calibration beside the bundle and can be deleted afterwards.

    Of several resolutions the first is calibrated; the command again, with another one first, adds
    schedules for that one, called bN-WIDTHxHEIGHT.
    """
    options.check_one_way(resolutions, height, width, frames)
    wanted = options.wanted_of(budgets, target_psnr, percentile, confidence, stages.DEFAULT_BUDGETS)
    options.check_samples(samples, method, wanted)
    scale, scales = options.guidance_of(guidance_scale)
    reasons: list[str] = []
    targets = find_targets(backend, planning, note=reasons.append)
    hush_libraries()
    checkpoint = stages.find_model(model)
    known = None if force else output
    first, *further = resolutions or (one_size(checkpoint, known, height, width, frames),)
    recording = RecordOptions(
        size=(first.height, first.width),
        frames=first.frames,
        prompts=prompts_of(checkpoint, file),
        steps=steps,
        samples=samples,
        guidance_scale=scale,
        guidance_range=scales,
        text_tokens=text_tokens,
        budgets=() if isinstance(wanted, Goal) else wanted,
    )
    exporting = _exporting(
        (first, *further),
        batch,
        text_tokens,
        weights,
        precisions,
        is_parity_checked=not skip_parity,
        parity_gib=parity_memory,
    )
    bundle = stages.export(checkpoint, output, exporting, note=note, is_forced=force)
    _plan(bundle, targets, planning, reasons, is_forced=force)
    recording = replace(recording, text_tokens=bundle.export.text_tokens)
    work = stages.calibration_directory(bundle, checkpoint, exporting)
    trajectories = _record(checkpoint, work, recording, is_forced=force)
    stages.bake_into(
        bundle,
        trajectories,
        wanted,
        BakeOptions(method=method),
        backend=backend,
        threads=threads,
        note=note,
    )
    measure(bundle, backend=backend, threads=threads)
    report_schedules(bundle, as_json=as_json)


@click.command()
@options.model
@_output
@options.resolutions
@options.height
@options.width
@options.frames
@options.batch
@options.text_tokens
@_weights
@_precision
@_skip_parity
@_parity_memory
@options.force
@options.as_json
def export(
    model: str,
    output: Path,
    resolutions: tuple[PictureSize, ...],
    height: int | None,
    width: int | None,
    frames: int | None,
    batch: Range | None,
    text_tokens: int | None,
    weights: Literal["link", "copy"],
    precisions: tuple[str, ...],
    skip_parity: bool,
    parity_memory: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint's graphs into a new bundle and compare them with diffusers.

    Where OUTPUT is a bundle of MODEL, resolutions that it does not list are added to it: its graphs
    serve them all and stay as they are.
    """
    options.check_one_way(resolutions, height, width, frames)
    hush_libraries()
    checkpoint = stages.find_model(model)
    known = None if force else output
    first, *further = resolutions or (one_size(checkpoint, known, height, width, frames),)
    exporting = _exporting(
        (first, *further),
        batch,
        text_tokens,
        weights,
        precisions,
        is_parity_checked=not skip_parity,
        parity_gib=parity_memory,
    )
    bundle = stages.export(checkpoint, output, exporting, note=note, is_forced=force)
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


def _exporting(
    sizes: Sequence[PictureSize],
    batch: Range | None,
    text_tokens: int | None,
    weights: Literal["link", "copy"],
    precisions: tuple[str, ...],
    *,
    is_parity_checked: bool,
    parity_gib: float | None,
) -> stages.ExportOptions:
    first, *further = sizes
    return stages.ExportOptions(
        size=(first.height, first.width),
        frames=first.frames,
        further_sizes=tuple(further),
        batch=batch,
        text_tokens=text_tokens,
        weights=weights,
        precisions=precisions or None,
        is_parity_checked=is_parity_checked,
        parity_bytes=None if parity_gib is None else int(parity_gib * 2**30),
    )


def one_size(
    checkpoint: Checkpoint,
    bundle: Path | None,
    height: int | None,
    width: int | None,
    frames: int | None,
) -> PictureSize:
    """What --height, --width and --frames say; without them what `bundle`, if there, renders."""
    is_any_given = (height, width, frames) != (None, None, None)
    if bundle is not None and not is_any_given and (bundle / MANIFEST).is_file():
        return Bundle.open(bundle).export.resolution.size
    return PictureSize(*stages.picture_size(checkpoint, height, width), frames)


def prompts_of(checkpoint: Checkpoint, file: Path | None) -> tuple[str, ...]:
    """The prompts of --prompts, or those that the checkpoint is calibrated on by default."""
    return stages.default_prompts(checkpoint) if file is None else tuple(read_prompts(file))
