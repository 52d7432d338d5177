"""One page that says it all: tables, plots, pictures, and what it was measured on.

Self-contained: styles, plots and pictures are inside, and nothing is fetched.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from meancache_trt import __version__
from meancache_trt.calibration.evaluation import (
    METRICS,
    Evaluation,
    Metric,
    MetricName,
    ReferenceName,
    Row,
)
from meancache_trt.errors import RuntimeUnavailableError
from meancache_trt.evaluate.marks import marks_of
from meancache_trt.evaluate.pictures import PictureStore
from meancache_trt.meancache.files import atomic_write

if TYPE_CHECKING:
    from jinja2 import Environment

COLUMNS, STRIP_COLUMNS = 4, 2
"""Pictures a row of the gallery, errors not counted."""

GAIN = 8
"""Errors are shown so many times as large: an error of 40 dB is a visible grey."""

_WITH_ERROR = 2  # the worst and the median

_LOSSLESS = 96
"""Sides up to this stay PNG; larger pictures become WebP, at a tenth of the bytes."""

_FORMS: dict[MetricName, str] = {"psnr": "{:.2f}", "ssim": "{:.5f}", "latent_error": "{:.4f}"}
_TITLES: dict[MetricName, str] = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "latent_error": "Latent error",
}


@dataclass(frozen=True)
class Cell:
    """A metric of one method at one budget, and whether no other mean or tail is better."""

    mean: str
    p5: str
    worst: str
    is_best: bool
    is_best_p5: bool


@dataclass(frozen=True)
class MetricTable:
    """Methods by budgets; a missing row is None. `tail` names the middle number of a cell."""

    title: str
    tail: str
    rows: list[tuple[str, list[Cell | None]]]


@dataclass(frozen=True)
class Card:
    """The best method at one budget; `fewer` is how many times fewer evaluations that is."""

    budget: int
    fewer: str
    method: str
    psnr: str
    worst: str


@dataclass(frozen=True)
class Shot:
    """A picture of the gallery."""

    source: str
    width: int
    height: int
    psnr: str
    description: str


@dataclass(frozen=True)
class Gallery:
    """One budget's pictures: a heading and prompt for each column, a line for each method.

    None stands where there is no picture, or it is not on disk any more.
    """

    budget: int
    columns: list[tuple[str, str]]
    lines: list[tuple[str, str, list[Shot | None]]]


def write_report(evaluation: Evaluation, path: Path, directory: Path) -> None:
    """Write the page atomically; `directory` is where the evaluation keeps its thumbnails.

    Raises `RuntimeUnavailableError` where matplotlib or jinja2 is not installed.
    """
    page = render_report(evaluation, directory)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_report(evaluation: Evaluation, directory: Path) -> str:
    """The page as text; see `write_report`."""
    environment = _environment()
    source = resources.files("meancache_trt.evaluate").joinpath("report.html.jinja")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    return template.render(**_context(evaluation, PictureStore(directory)))


def require_report() -> None:
    """Raise `RuntimeUnavailableError` where the report lacks a package: before the work."""
    _environment()


def _environment() -> Environment:
    try:
        import matplotlib  # noqa: PLC0415, F401  an extra, like the next
        from jinja2 import Environment, StrictUndefined  # noqa: PLC0415
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"the report needs matplotlib and jinja2 ({error}); install meancache-trt[evaluate]. "
            "What was measured is in evaluation.json: run `evaluate` on its directory again"
        ) from error
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _context(evaluation: Evaluation, store: PictureStore) -> dict[str, Any]:
    from meancache_trt.evaluate import plots  # noqa: PLC0415  (needs matplotlib)

    marks = marks_of(evaluation)
    budgets, references = evaluation.budgets, evaluation.references
    best = best_row(evaluation, budgets[len(budgets) // 2])
    costs = evaluation.edge_costs
    is_fine = "fine" in references
    scatters = [plots.scatter(evaluation, budget, "own") for budget in budgets]
    return {
        "evaluation": evaluation,
        "setup": evaluation.setup,
        "version": __version__,
        "marks": marks,
        "banded": evaluation.against if len(marks) > plots.BANDS else "each method",
        "cards": [_card(evaluation, budget) for budget in budgets],
        "lead": _lead(evaluation),
        "tables": [_table(evaluation, "own", metric) for metric in METRICS],
        "differences": _differences(evaluation),
        "fine_tables": [_table(evaluation, "fine", "psnr")] if is_fine else [],
        "own_against_fine": _own_against_fine(evaluation),
        "curves": [plots.pareto(evaluation, "own", metric) for metric in METRICS],
        "fine_curves": [plots.pareto(evaluation, "fine", m) for m in METRICS if is_fine],
        "timelines": [plots.timeline(evaluation, budget) for budget in budgets],
        "scatters": [found for found in scatters if found],
        "heat_map": plots.heat_map(costs, best) if costs else None,
        "heat_row": best,
        "galleries": [
            gallery for budget in budgets if (gallery := _gallery(evaluation, budget, store))
        ],
        "calibrations": [row for row in evaluation.rows if row.schedule.calibration],
    }


def best_row(evaluation: Evaluation, budget: int) -> Row:
    """The row with the highest mean PSNR against the model's own steps at a budget."""
    rows = [row for row in evaluation.rows if row.budget == budget]
    return max(rows, key=lambda row: row.own.psnr.summary.mean if row.own else 0.0)


def _card(evaluation: Evaluation, budget: int) -> Card:
    row = best_row(evaluation, budget)
    assert row.own is not None
    return Card(
        budget=budget,
        fewer=f"{evaluation.setup.steps / budget:.1f}",
        method=row.method,
        psnr=f"{row.own.psnr.summary.mean:.1f}",
        worst=f"{row.own.psnr.summary.worst:.1f}",
    )


def _lead(evaluation: Evaluation) -> str:
    """Who wins, in one sentence."""
    winners = [best_row(evaluation, budget).method for budget in evaluation.budgets]
    if len(evaluation.methods) == 1:
        return ""
    won: dict[str, list[int]] = {method: [] for method in winners}
    for budget, method in zip(evaluation.budgets, winners, strict=True):
        won[method].append(budget)
    if len(won) == 1:
        return f"{winners[0]} has the highest mean PSNR at every budget."
    parts = [f"{method} at {_listed(budgets)}" for method, budgets in won.items()]
    return f"Highest mean PSNR: {'; '.join(parts)} evaluations."


def _listed(budgets: Sequence[int]) -> str:
    *head, last = map(str, budgets)
    return f"{', '.join(head)} and {last}" if head else last


def _table(evaluation: Evaluation, reference: ReferenceName, name: MetricName) -> MetricTable:
    best = {budget: _best(evaluation, reference, name, budget) for budget in evaluation.budgets}
    rows = [
        (method, [_cell(evaluation.row(method, b), reference, name, best[b]) for b in best])
        for method in evaluation.methods
    ]
    return MetricTable(_TITLES[name], "p95" if name == "latent_error" else "p5", rows)


def _best(
    evaluation: Evaluation, reference: ReferenceName, name: MetricName, budget: int
) -> tuple[float, float]:
    """The best mean and the best 5th percentile at a budget."""
    metrics = [
        comparison.metric(name).summary
        for row in evaluation.rows
        if row.budget == budget and (comparison := row.comparison(reference))
    ]
    choose = min if name == "latent_error" else max
    return choose(m.mean for m in metrics), choose(m.p5 for m in metrics)


def _cell(
    row: Row | None, reference: ReferenceName, name: MetricName, best: tuple[float, float]
) -> Cell | None:
    comparison = row.comparison(reference) if row else None
    if comparison is None:
        return None
    found, form = comparison.metric(name).summary, _FORMS[name]
    return Cell(
        mean=form.format(found.mean),
        p5=form.format(found.p5),
        worst=form.format(found.worst),
        is_best=found.mean == best[0],
        is_best_p5=found.p5 == best[1],
    )


def _differences(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, str] | None]]]:
    """Of every other method the PSNR above the compared one, with how sure that is."""
    return [
        (method, [_difference(evaluation.row(method, budget)) for budget in evaluation.budgets])
        for method in evaluation.methods
        if method != evaluation.against
    ]


def _difference(row: Row | None) -> tuple[str, str] | None:
    """Text, and "below", "above" or "" where two standard errors do not tell."""
    found = row.own.psnr.difference if row and row.own else None
    if found is None:
        return None
    mean, error = f"{found.mean:+.2f}".replace("-", "−"), found.standard_error
    if error is None:
        return mean, ""
    side = "above" if found.mean > 0 else "below"
    return f"{mean} ± {error:.2f}", side if abs(found.mean) > 2 * error else ""


def _own_against_fine(evaluation: Evaluation) -> Metric | None:
    return evaluation.full.fine.psnr if evaluation.full.fine else None


def _gallery(evaluation: Evaluation, budget: int, store: PictureStore) -> Gallery | None:
    best = best_row(evaluation, budget)
    assert best.own is not None
    rows = [row for row in evaluation.rows if row.budget == budget]
    rows.sort(key=lambda row: -row.own.psnr.summary.mean if row.own else 0.0)
    is_video = evaluation.setup.frames is not None
    chosen = _chosen(best.own.psnr.values, STRIP_COLUMNS if is_video else COLUMNS)
    columns = list(_columns(evaluation, chosen, best.method))
    lines = []
    for row in (evaluation.full, *rows):
        psnr = f"{row.own.psnr.summary.mean:.1f} dB" if row.own else ""
        lines.append((row.method, psnr, list(_shots(evaluation, row, chosen, store))))
    is_any = any(shot for _, _, shots in lines for shot in shots)
    return Gallery(budget, columns, lines) if is_any else None


def _chosen(values: Sequence[float], count: int) -> list[int]:
    """The worst picture, the median one, and then the first others."""
    order = np.argsort(values, kind="stable").tolist()
    named = [order[0], order[len(order) // 2]]
    return list(dict.fromkeys([*named, *range(len(values))]))[:count]


def _columns(evaluation: Evaluation, chosen: Sequence[int], best: str) -> Iterator[tuple[str, str]]:
    headings = [f"worst of {best}", f"median of {best}"]
    for place, index in enumerate(chosen):
        is_named = place < _WITH_ERROR
        yield headings[place] if is_named else "", evaluation.prompts[index].text
        if is_named:
            yield f"its error ×\N{NO-BREAK SPACE}{GAIN}", ""


def _shots(
    evaluation: Evaluation, row: Row, chosen: Sequence[int], store: PictureStore
) -> Iterator[Shot | None]:
    """A row's pictures, the first ones followed by their errors."""
    for place, index in enumerate(chosen):
        picture = _opened(store, row, index)
        if picture is None:
            yield from [None, None][: 1 + (place < _WITH_ERROR)]
            continue
        psnr = f"{row.own.psnr.values[index]:.1f}" if row.own else ""
        prompt = evaluation.prompts[index]
        described = f"{row.method} with {row.budget} evaluations: {prompt.text}"
        described += f" (seed {prompt.seed})" + (f", {psnr} dB" if psnr else "")
        yield _shot(picture, psnr, described)
        if place < _WITH_ERROR:
            reference = _opened(store, evaluation.full, index)
            error = _error(picture, reference) if row.own and reference else None
            yield _shot(error, "", f"error of {described}") if error else None


def _opened(store: PictureStore, row: Row, index: int) -> Image.Image | None:
    path = store.thumbnail_path(row.key, index)
    if not path.is_file():
        return None
    with Image.open(path) as image:
        image.load()
        return image


def _error(picture: Image.Image, reference: Image.Image) -> Image.Image:
    """The absolute difference of two thumbnails, `GAIN` times, on black."""
    pair = [np.asarray(image.convert("RGB"), np.int16) for image in (picture, reference)]
    return Image.fromarray(np.minimum(GAIN * np.abs(pair[0] - pair[1]), 255).astype(np.uint8))


def _shot(image: Image.Image, psnr: str, description: str) -> Shot:
    return Shot(_data_uri(image), image.width, image.height, psnr, description)


def _data_uri(image: Image.Image) -> str:
    buffer, is_small = io.BytesIO(), max(image.size) <= _LOSSLESS
    if is_small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="WEBP", quality=90, method=4)
    kind = "png" if is_small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
