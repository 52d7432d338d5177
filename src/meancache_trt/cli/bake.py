"""`bake`: a schedule from nodes, from a published preset, or from a calibration."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from click.core import ParameterSource

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import (
    DEFAULT_METHOD,
    BakeOptions,
    bakeable_methods,
)
from meancache_trt.calibration.placements import PLACEMENTS
from meancache_trt.calibration.target import Goal
from meancache_trt.calibration.trajectories import load_trajectories
from meancache_trt.cli import options
from meancache_trt.cli.output import note, print_json, show_schedule
from meancache_trt.meancache.presets import preset as load_preset
from meancache_trt.meancache.schedule import FITTED, Schedule, save_schedule
from meancache_trt.meancache.schedule import bake as bake_schedule
from meancache_trt.meancache.sigmas import make_grid


@click.command()
@click.option("--preset", help="A published schedule, such as Qwen/Qwen-Image:10.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="What `calibrate` wrote: nodes and spans are chosen from its trajectories.",
)
@click.option("--budget", type=int, help="Network evaluations an image, with --calibration.")
@options.target_psnr
@options.percentile
@options.confidence
@click.option(
    "--method",
    type=click.Choice(bakeable_methods()),
    help="How skipped steps are estimated. fitted: by weights fitted to --calibration, for which "
    "the network of --bundle runs.",
)
@click.option(
    "--placement",
    type=click.Choice(list(PLACEMENTS)),
    help="How nodes are chosen, with --calibration; by default as the method usually does. "
    "own-grid: every step of a grid of --budget steps, as solvers are run without skipping.",
)
@click.option("--nodes", type=options.NUMBERS, help="Evaluated steps: 0,1,3,7.")
@click.option("--spans", type=options.NUMBERS, help="K of each edge between nodes: 1,2,1.")
@options.steps
@click.option("--shift", type=float, default=1.0, show_default=True, help="Static shift.")
@click.option("--mu", type=float, help="Dynamic shift, instead of --shift.")
@click.option("--shift-terminal", type=float, help="Last sigma before 0 that the grid ends at.")
@options.height
@options.width
@options.guidance_scale
@click.option("--name", help="Name of the schedule; by default its method and budget.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write a schedule file.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Add it to this bundle.")
@options.backend
@options.threads
@options.as_json
def bake(
    preset: str | None,
    calibration: Path | None,
    budget: int | None,
    target_psnr: float | None,
    percentile: float | None,
    confidence: float | None,
    method: str | None,
    placement: str | None,
    nodes: tuple[int, ...] | None,
    spans: tuple[int, ...] | None,
    steps: int,
    shift: float,
    mu: float | None,
    shift_terminal: float | None,
    height: int | None,
    width: int | None,
    guidance_scale: float | None,
    name: str | None,
    output: Path | None,
    bundle: Path | None,
    backend: str,
    threads: int,
    as_json: bool,
) -> None:
    """Fold a schedule into weights, one row for each network evaluation.

    \b
    From nodes:         bake --method official --nodes 0,1,3,7 --spans 1,2,1 --steps 10 --shift 3
    A published one:    bake --preset Qwen/Qwen-Image:10
    From a calibration: bake --calibration DIR --budget 10 --bundle flux.mcb
    By another rule:    bake --calibration DIR --budget 10 --bundle flux.mcb --method official

    A calibration of another resolution than the bundle's default has it in its schedules' names.
    """
    _refuse_what_does_not_apply(preset is not None, calibration is not None, nodes is not None)
    opened = None if bundle is None else Bundle.open(bundle)
    if preset is not None:
        schedule = load_preset(preset, height=height, width=width)
    elif calibration is not None:
        choosing = BakeOptions(method=method or DEFAULT_METHOD, placement=placement)
        budgets = () if budget is None else ((budget,),)
        wanted = options.wanted_of(budgets, target_psnr, percentile, confidence, ())
        schedule = _from_calibration(
            calibration, wanted, choosing, opened, backend=backend, threads=threads
        )
    else:
        assert nodes is not None
        if method == FITTED:
            raise click.UsageError("fitted weights come from recordings; give --calibration")
        grid = make_grid(
            steps, shift=shift, mu=mu, shift_terminal=shift_terminal, height=height, width=width
        )
        schedule = bake_schedule(
            method or "euler", grid, nodes, spans, guidance_scale=guidance_scale
        )
    if name is not None:
        schedule = msgspec.structs.replace(schedule, name=name)
    elif opened is not None:
        # As `build` calls it, where it is the method that `build` would choose.
        is_own = method in (None, DEFAULT_METHOD) and placement is None
        is_default = is_own and calibration is not None
        own = f"b{schedule.budget}" if is_default else None
        schedule = stages.named_in(opened, schedule, own)
    _deliver(schedule, output, opened)
    _print(schedule, as_json=as_json)


_SOURCES = ("--preset", "--calibration", "--nodes")
_APPLIES = {
    "--preset": ("height", "width"),
    "--calibration": (
        *("budget", "target_psnr", "percentile", "confidence"),
        *("method", "placement", "backend", "threads"),
    ),
    "--nodes": (
        *("method", "spans", "steps", "shift", "mu", "shift_terminal"),
        *("height", "width", "guidance_scale"),
    ),
}
"""What each way of baking takes besides what all take."""


def _refuse_what_does_not_apply(*is_given: bool) -> None:
    if sum(is_given) != 1:
        raise click.UsageError("give --nodes, --preset or --calibration, and only one of them")
    source = next(name for name, given in zip(_SOURCES, is_given, strict=True) if given)
    context = click.get_current_context()
    for option in {name for names in _APPLIES.values() for name in names} - {*_APPLIES[source]}:
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            name = option.replace("_", "-")
            raise click.UsageError(f"--{name} does not apply to {source}; leave it out")


def _from_calibration(
    directory: Path,
    wanted: stages.Wanted,
    choosing: BakeOptions,
    bundle: Bundle | None,
    *,
    backend: str,
    threads: int,
) -> Schedule:
    if not wanted:
        raise click.UsageError("--calibration needs --budget or --target-psnr")
    is_run = choosing.method == FITTED or isinstance(wanted, Goal)
    if is_run and bundle is None:
        raise click.UsageError(
            "fitted schedules and --target-psnr run the network; give its --bundle, or a --budget "
            "and another --method"
        )
    trajectories = load_trajectories(directory)
    if bundle is None:
        (schedule,) = stages.bake_wanted(trajectories, wanted, choosing)
    else:
        (schedule,) = stages.bake_for(
            bundle, trajectories, wanted, choosing, backend=backend, threads=threads, note=note
        )
    stages.warn_of(schedule, note)
    return schedule


def _deliver(schedule: Schedule, output: Path | None, bundle: Bundle | None) -> None:
    if output is not None:
        save_schedule(schedule, output)
        note(f"wrote {output}")
    if bundle is not None:
        bundle.add_schedule(schedule)
        note(f"added schedule {schedule.name} to {bundle.directory}")


def _print(schedule: Schedule, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "sigmas": schedule.grid.sigmas,
                "timesteps": schedule.grid.timesteps,
                "nodes": schedule.nodes,
                "weights": schedule.weights,
            }
        )
        return
    show_schedule(schedule)
