"""`demo`."""

from __future__ import annotations

from pathlib import Path

import click

from meancache_trt.cli import options
from meancache_trt.cli.output import (
    decibels,
    hush_libraries,
    note,
    print_json,
    print_table,
    progress,
)


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Directory for the bundle, the pictures and the table.",
)
@options.threads
@options.as_json
def demo(output: Path, threads: int, as_json: bool) -> None:
    """Run the whole path on the small FLUX model that comes with the package.

    Exports and calibrates it, bakes schedules, renders eight prompts at 50, 15, 10 and 6 network
    evaluations, prints a table and writes a contact sheet.
    """
    from meancache_trt.demo import run_demo  # noqa: PLC0415  (needs torch)

    hush_libraries()
    with progress("demo") as report:
        rows = run_demo(output, threads=threads, note=note, report=report)
    if as_json:
        print_json({"rows": rows})
        return
    print_table(
        ["B", "engine calls", "ms / image", "speed-up", "PSNR mean dB", "PSNR worst dB"],
        [
            [
                row.budget,
                row.engine_calls,
                f"{row.ms_per_image:.1f}",
                f"{row.speedup:.2f}x",
                decibels(row.psnr_mean),
                decibels(row.psnr_min),
            ]
            for row in rows
        ],
    )
    click.echo("ms / image: the denoising loop, median. PSNR: against the model's own 50 steps.")
    note(f"contact sheet: {output / 'contact-sheet.png'}")
