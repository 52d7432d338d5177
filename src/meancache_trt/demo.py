"""The main job on the small trained model: build, render at several budgets, compare."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image, ImageDraw

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.metrics import compare as psnr_summary
from meancache_trt.conditioning import Conditioning
from meancache_trt.meancache.files import atomic_write, write_json
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.probe import Probe
from meancache_trt.meancache.runtime import Graph
from meancache_trt.meancache.schedule import Schedule
from meancache_trt.measured import measure
from meancache_trt.record import Note, RecordOptions, Report
from meancache_trt.render import Pipeline
from meancache_trt.rendering import Rendering
from meancache_trt.session import Session
from meancache_trt.standins import DEMO_PROMPTS

STEPS = 50
BUDGETS = (15, 10, 6)
ROUNDS = 5
"""Timed renders of each picture at each budget; interleaved, and the median is kept."""

SEED = 7


class Row(msgspec.Struct, frozen=True):
    """One budget of the comparison.

    `engine_calls` is the number of transformer executions counted for one picture,
    `ms_per_image` the median denoising loop, `speedup` its ratio to the full integration in the
    same interleaved run. PSNR in dB is against the full integration, None for itself.
    """

    budget: int
    engine_calls: int
    ms_per_image: float
    speedup: float
    psnr_mean: float | None
    psnr_min: float | None


def run_demo(
    directory: Path,
    *,
    threads: int = 0,
    note: Note = lambda _: None,
    report: Report = lambda *_: None,
) -> list[Row]:
    """Build, render and compare in `directory`; returns one row a budget, the full one first.

    Leaves `flux.mcb` (the bundle), `pictures/`, `contact-sheet.png` and `table.json` there.
    """
    bundle = _build(directory, threads, note, report)
    with Pipeline(bundle, threads=threads) as pipeline:
        note("encoding eight prompts")
        conditioning = pipeline.encode(DEMO_PROMPTS)
        rows, renderings = compare(pipeline, conditioning, (STEPS, *BUDGETS), report)
    for budget, pictures in renderings.items():
        folder = directory / "pictures" / f"b{budget:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures):
            picture.save(folder / f"{index}.png")
    with atomic_write(directory / "contact-sheet.png") as temporary:
        contact_sheet(renderings).save(temporary, format="PNG")
    write_json(directory / "table.json", {"rows": rows})
    return rows


def _build(directory: Path, threads: int, note: Note, report: Report) -> Bundle:
    checkpoint = stages.find_model("standin/flux")
    size = stages.picture_size(checkpoint, None, None)
    exporting = stages.ExportOptions(size=size)
    bundle = stages.export(
        checkpoint, directory / "flux.mcb", exporting, note=note, is_forced=False
    )
    recording = RecordOptions(size=size, prompts=stages.default_prompts(checkpoint), steps=STEPS)
    trajectories = stages.record_pipeline(
        checkpoint, directory / "calibration", recording, note=note, report=report
    )
    stages.bake_into(bundle, trajectories, BUDGETS)
    measure(bundle, backend="auto", threads=threads)
    return bundle


def compare(
    pipeline: Pipeline, conditioning: Conditioning, budgets: Sequence[int], report: Report
) -> tuple[list[Row], dict[int, list[Rendering]]]:
    """Render every prompt at every budget, interleaved, and measure against the first budget.

    Picture i has seed `SEED` + i at every budget. Each is rendered `ROUNDS` times.
    """
    schedules = [pipeline.schedule(budget) for budget in budgets]
    calls = [_count_calls(pipeline, conditioning, schedule) for schedule in schedules]
    renderings: dict[int, list[Rendering]] = {budget: [] for budget in budgets}
    times: dict[int, list[float]] = {budget: [] for budget in budgets}
    pictures = len(conditioning.prompts)
    for index in range(pictures):
        prompt = conditioning.select(index)
        for turn in range(ROUNDS):
            for budget, schedule in zip(budgets, schedules, strict=True):
                found = pipeline.render(prompt, seed=SEED + index, schedule=schedule)
                times[budget].append(found[0].loop_ms)
                renderings[budget] += found if turn == 0 else []
        report(index + 1, pictures)
    medians = {budget: statistics.median(measured) for budget, measured in times.items()}
    rows = []
    for budget, count in zip(budgets, calls, strict=True):
        mean, worst = _fidelity(renderings[budget], renderings[budgets[0]])
        speedup = medians[budgets[0]] / medians[budget]
        rows.append(Row(budget, count, medians[budget], speedup, mean, worst))
    return rows, renderings


def _fidelity(
    pictures: Sequence[Rendering], references: Sequence[Rendering]
) -> tuple[float | None, float | None]:
    summary = psnr_summary(
        *(np.stack([r.pixels for r in batch]) for batch in (pictures, references))
    )
    return (summary.mean, summary.worst) if summary else (None, None)


def _count_calls(pipeline: Pipeline, conditioning: Conditioning, schedule: Schedule) -> int:
    """Render once through a counting transformer; also warms the graphs up."""
    probes: list[Probe] = []

    def probe(graph: Graph) -> Graph:
        probes.append(Probe(graph))
        return probes[-1]

    size = pipeline.resolution()
    session = Session(pipeline.graphs, schedule, size, wrap_transformer=probe)
    noise = philox_normal(SEED, size.noise_shape)[None]
    session.run(noise, conditioning.select(0).tensors, pipeline.guidance())
    return sum(len(probe.calls_ms) for probe in probes)


def contact_sheet(renderings: Mapping[int, Sequence[Rendering]], scale: int = 2) -> Image.Image:
    """One row a budget, one column a prompt, with labels; pictures enlarged `scale` times."""
    first = next(iter(renderings.values()))
    height, width = (scale * side for side in first[0].pixels.shape[:2])
    margin, gap, caption = 64, 4, 58
    sheet = Image.new(
        "RGB",
        (margin + len(first) * (width + gap), caption + len(renderings) * (height + gap)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, rendering in enumerate(first):
        left = margin + column * (width + gap)
        text = "\n".join(textwrap.wrap(rendering.prompt, width // 6)[:4])
        draw.multiline_text((left, 2), text, fill="black", spacing=2)
    for row, (budget, pictures) in enumerate(renderings.items()):
        top = caption + row * (height + gap)
        draw.text((4, top + height // 2 - 6), f"B = {budget}", fill="black")
        for column, rendering in enumerate(pictures):
            picture = rendering.image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * (width + gap), top))
    return sheet
