"""`calibrate`: record a checkpoint's pipeline, and bake schedules from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import BakeOptions
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.cli import calibrating, options, sizes
from meancache_trt.cli.calibrating import Calibrating
from meancache_trt.cli.inspect import print_schedules, schedule_facts
from meancache_trt.cli.output import hush_libraries, note, print_json, progress
from meancache_trt.cli.sizes import Sizes
from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.pipeline import identify
from meancache_trt.meancache.schedule import Schedule, save_schedule
from meancache_trt.record import Recorder


@click.command()
@options.model
@options.loras
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to record in."
)
@sizes.options
@options.text_tokens
@options.guidance_scale_2
@calibrating.options_of_calibrate
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Run the network by this bundle's engine; by default the diffusers pipeline runs it.",
)
@options.backend
@options.threads
@options.as_json
def calibrate(
    model: str,
    loras: tuple[str, ...],
    output: Path,
    sizes: Sizes,
    text_tokens: int | None,
    guidance_scale_2: float | None,
    calibrating: Calibrating,
    bundle: Path | None,
    backend: str,
    threads: int,
    as_json: bool,
) -> None:
    """Record a checkpoint's own pipeline over all its steps, and bake schedules from that.

    Can be interrupted and resumed. With --budget or --target-psnr, schedules are written to
    OUTPUT/bN.json, for which the network runs again, along the schedules' own trajectories;
    `bake --calibration OUTPUT` makes more later. OUTPUT holds one resolution.
    """
    if len(sizes.resolutions) > 1:
        raise click.UsageError("a calibration is of one resolution; give --resolution once")
    if bundle is None and (backend != "auto" or threads):
        raise click.UsageError("--backend and --threads are those of --bundle's engine; give it")
    wanted = calibrating.wanted(())
    hush_libraries()
    checkpoint = stages.find_model(model, loras)
    (size,) = sizes.of(checkpoint)
    engine = None if bundle is None else _engine(bundle, checkpoint, guidance_scale_2)
    if engine is not None:
        text_tokens = text_tokens or engine.export.text_tokens
        if guidance_scale_2 is None:
            guidance_scale_2 = engine.export.second_guidance_scale
    recording = calibrating.recording(checkpoint, size, text_tokens, wanted)
    recorder = Recorder(checkpoint, replace(recording, guidance_scale_2=guidance_scale_2))
    with progress("calibrate") as report:
        trajectories = recorder.record(output, note=note, report=report)
    schedules: tuple[Schedule, ...] = ()
    choosing = BakeOptions(method=calibrating.method)
    if wanted and engine is not None:
        schedules = stages.bake_for(
            engine, trajectories, wanted, choosing, backend=backend, threads=threads, note=note
        )
    elif wanted:
        network = recorder.field(trajectories)
        schedules = stages.bake_wanted(trajectories, wanted, choosing, network, note=note)
    for schedule in schedules:
        save_schedule(schedule, output / f"b{schedule.budget}.json")
        stages.warn_of(schedule, note)
    _report(trajectories, schedules, as_json=as_json)


def _engine(path: Path, checkpoint: Checkpoint, guidance_scale_2: float | None) -> Bundle:
    """The bundle; an error before anything is recorded where it is of another model."""
    bundle = Bundle.open(path)
    model = identify(checkpoint)
    if bundle.export.model.digest != model.digest:
        raise InputError(
            f"{path} is a bundle of {bundle.export.model.name}, found {model.name} to calibrate; "
            "give its own checkpoint and LoRAs, or leave --bundle out"
        )
    own = bundle.export.second_guidance_scale
    if guidance_scale_2 not in (None, own):
        raise InputError(
            f"{path} guides its second stage by {'the first scale' if own is None else own}, found "
            f"--guidance-scale-2 {guidance_scale_2:g}; leave it out, or build another bundle"
        )
    return bundle


def _report(trajectories: Trajectories, schedules: Sequence[Schedule], *, as_json: bool) -> None:
    recorded = len(trajectories) * trajectories.grid.steps
    if as_json:
        print_json(
            {
                "samples": len(trajectories),
                "recording_seconds": trajectories.seconds,
                "recording_evaluations": recorded,
                "schedules": [schedule_facts(schedule) for schedule in schedules],
            }
        )
        return
    note(f"{len(trajectories)} samples, {trajectories.seconds:.1f} s of recording")
    if schedules:
        print_schedules(schedules)
