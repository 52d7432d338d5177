"""`doctor`: what this machine can run, and what will be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from meancache_trt.bundle import Bundle
from meancache_trt.cli import options
from meancache_trt.cli.output import print_json, print_table
from meancache_trt.doctor import BundleReport, FlavourReport, PlanReport, Report, Verdict, examine
from meancache_trt.engine.survey import LibraryState


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the driver, and each library, may take to answer.",
)
@options.as_json
def doctor(bundle: Path | None, timeout_s: float, as_json: bool) -> None:
    """Show what this machine can run, and what will be chosen; with a BUNDLE, also for that one.

    Ends with status 0 also where nothing can run.
    """
    report = examine(None if bundle is None else Bundle.open(bundle), timeout_s=timeout_s)
    if as_json:
        print_json(report)
        return
    _print_machine(report)
    _print_gpus(report)
    _print_backends(report)
    if report.bundle is not None:
        _print_bundle(report.bundle)


def _print_machine(report: Report) -> None:
    machine = {
        "python": report.python,
        "platform": report.platform,
        "cores": report.cores,
        "free disk": _gib(report.free_disk_bytes),
    }
    print_table(["machine", ""], list(machine.items()))
    click.echo()
    packages = [[name, version or "not installed"] for name, version in report.packages.items()]
    print_table(["package", "version"], packages)
    click.echo()


def _print_gpus(report: Report) -> None:
    driver = report.driver
    if driver.cuda_version is not None:
        click.echo(f"NVIDIA driver for CUDA up to {driver.cuda_version}")
    if driver.problem is not None:
        click.echo(f"no GPU: {driver.problem}")
    if driver.gpus:
        print_table(
            ["GPU", "name", "compute capability", "free", "of"],
            [
                [
                    *(gpu.index, gpu.name, gpu.compute_capability),
                    *map(_gib, (gpu.free_bytes, gpu.total_bytes)),
                ]
                for gpu in driver.gpus
            ],
        )
    click.echo()
    for flavour in report.flavours:
        targets = ", ".join(flavour.compute_capabilities or ["the GPU at hand"])
        click.echo(_library(flavour, f"builds for {targets}"))
        for index, verdict in flavour.gpus.items():
            click.echo(f"  GPU {index}: {_said(verdict)}")
    library = report.onnxruntime
    click.echo(_library(library, f"has {', '.join(library.providers)}"))
    click.echo()


def _library(state: FlavourReport | LibraryState, abilities: str) -> str:
    if state.problem is not None:
        return f"{state.name}: {state.problem}"
    return f"{state.name} {state.version}: {abilities}"


def _print_backends(report: Report) -> None:
    for backend in report.backends:
        runs = "runs here" if backend.is_available else "does not run here"
        click.echo(f"{backend.name}: {runs}; {backend.state}")
    click.echo(f"auto: {report.auto.name or 'nothing'} ({report.auto.why})")


def _print_bundle(report: BundleReport) -> None:
    click.echo()
    click.echo(f"bundle {report.path}  ({report.bundle_id[:16]})")
    click.echo(f"auto: {report.backend.name or 'nothing'} ({report.backend.why})")
    click.echo(f"schedule: {report.schedule.name or 'none'} ({report.schedule.why})")
    click.echo()
    for schedule in report.schedules:
        click.echo(
            f"schedule {schedule.name}, {schedule.budget} evaluations: {_said(schedule.verdict)}"
        )
    _print_plans(report.plans)


def _print_plans(plans: Sequence[PlanReport]) -> None:
    """One line for all plans of which the same is to be said; `--json` has each."""
    alike: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        said = _said(plan.verdict)
        alike.setdefault((plan.built_for, said), []).append(plan.component or plan.path)
    for (built_for, said), names in alike.items():
        what = f"plans for {built_for} ({', '.join(names)})" if built_for else ", ".join(names)
        click.echo(f"{what}: {said}")
    if not plans:
        click.echo("no plans; `meancache-trt plan` builds them")


def _said(verdict: Verdict) -> str:
    return f"{'usable' if verdict.is_usable else 'not usable'}, {verdict.why}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
