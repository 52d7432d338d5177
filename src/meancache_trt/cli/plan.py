"""`plan`: TensorRT plans of bundles, and what an evaluation takes here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import msgspec

from meancache_trt.bundle import Bundle
from meancache_trt.cli import options, planning
from meancache_trt.cli.output import note, print_json, print_table, transient_progress
from meancache_trt.engine.tensorrt.library import FLAVOURS
from meancache_trt.manifest import Exported
from meancache_trt.measured import Measured, describe, measure
from meancache_trt.plan import Planned, prune
from meancache_trt.plan import plan as plan_bundles
from meancache_trt.plan_targets import PlanOptions, find_targets
from meancache_trt.shapes import Range, Ranges

_BACKENDS = ("auto", "onnxruntime", *FLAVOURS)


def _range(name: str, what: str) -> Callable[[planning.Command], planning.Command]:
    return click.option(
        f"--{name}",
        type=options.Parsed("range", Range),
        metavar="MIN/OPT/MAX",
        help=f"{what}; by default what the bundle lists.",
    )


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(_BACKENDS),
    default="auto",
    show_default=True,
    help="auto: TensorRT for the GPU at hand, TensorRT for RTX with --compute-capability, else "
    "ONNX Runtime.",
)
@_range("batch", "Pictures at a time")
@_range("height", "Picture height in pixels")
@_range("width", "Picture width in pixels")
@_range("frames", "Frames of a video")
@_range("text-tokens", "Text length")
@planning.options
@click.option(
    "--prune",
    "is_pruned",
    is_flag=True,
    help="Remove plans of graphs that the bundle no longer has, and of other library versions.",
)
@options.threads
@options.force
@options.as_json
def plan(
    bundles: tuple[Path, ...],
    backend: str,
    batch: Range | None,
    height: Range | None,
    width: Range | None,
    frames: Range | None,
    text_tokens: Range | None,
    planning: PlanOptions,
    is_pruned: bool,
    threads: int,
    force: bool,
    as_json: bool,
) -> None:
    """Build TensorRT plans of all graphs of bundles, and measure an evaluation that runs here.

    \b
    For the GPU at hand:      plan flux.mcb
    For others, without one:  plan flux.mcb --compute-capability 8.9,12.0

    Plans are kept in the bundle. One whose graph, precision, sizes, library, GPU and options are
    those of a plan that is there is not built again. Without a GPU and without
    --compute-capability, an evaluation is measured on ONNX Runtime.
    """
    given = {
        "batch": batch,
        "height": height,
        "width": width,
        "frames": frames,
        "text_tokens": text_tokens,
    }
    found: list[str] = []
    targets = find_targets(backend, planning, note=found.append)
    opened = [Bundle.open(path) for path in bundles]
    for text in found:  # an error is said alone
        note(text)
    planned = plan_bundles(
        opened,
        targets,
        planning,
        ranges=lambda export: _ranges(export, given),
        note=note,
        progress=transient_progress,
        is_forced=force,
    )
    for bundle in opened:
        prune(bundle, targets, note=note, is_removed=is_pruned)
    measured = [
        # Plans of other GPUs need not run here.
        None if planning.compute_capabilities else measure(bundle, backend=backend, threads=threads)
        for bundle in opened
    ]
    _show(bundles, planned, measured, as_json=as_json)


def _ranges(export: Exported, given: dict[str, Range | None]) -> Ranges:
    """What the bundle lists, with what was given instead."""
    known = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(export.ranges, **known)


def _show(
    paths: Sequence[Path],
    planned: Sequence[Sequence[Planned]],
    measured: Sequence[Measured | None],
    *,
    as_json: bool,
) -> None:
    if as_json:
        found = zip(paths, planned, measured, strict=True)
        print_json({"bundles": [_facts(*of_bundle) for of_bundle in found]})
        return
    for path, plans, record in zip(paths, planned, measured, strict=True):
        click.echo(f"{path}")
        if plans:
            _show_plans(plans)
        if record is not None:
            _show_measured(record)


def _facts(path: Path, plans: Sequence[Planned], measured: Measured | None) -> dict[str, object]:
    return {
        "bundle": str(path),
        "plans": [
            {"is_reused": plan.is_reused, **msgspec.to_builtins(plan.record)} for plan in plans
        ],
        "measured": measured,
    }


def _show_plans(plans: Sequence[Planned]) -> None:
    print_table(
        ["component", "precision", "GPU", "", "MB", "built in s", "fused attention"],
        [
            [
                record.key.component,
                record.key.precision,
                record.key.compute_capability,
                "reused" if plan.is_reused else "built",
                f"{record.file.size_bytes / 1e6:.1f}",
                f"{record.build_s:.1f}",
                record.fused_attention,
            ]
            for plan in plans
            for record in [plan.record]
        ],
    )


def _show_measured(record: Measured) -> None:
    click.echo(describe(record))
    print_table(["graph", "load ms"], [[k, f"{ms:.1f}"] for k, ms in record.load_ms.items()])
