"""The rows as tables, for a terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.rivals.rows import Row

from meancache_trt.calibration.metrics import PsnrSummary

HEAD = (
    "method",
    "setting",
    "work",
    "time",
    "PSNR, dB",
    "200 steps",
    "fitted at",
    "its PSNR, dB",
    "fitted ahead",
)
NUMBERS = 2
"""Columns before the numbers."""


def rows_table(rows: Sequence[Row], *, is_markdown: bool) -> str:
    """Every row that ran, in the order of their methods, each method's by work."""
    order = list(dict.fromkeys(row.method for row in rows))
    ran = [row for row in rows if row.error is None]
    ran.sort(key=lambda row: (order.index(row.method), row.evaluations or 0.0))
    return layout([HEAD, *map(_cells, ran)], is_markdown=is_markdown)


def closest_table(rows: Sequence[Row], *, largest: int, is_markdown: bool) -> str:
    """Of every method the setting that comes closest to `fitted`, or is furthest ahead of it.

    Settings of more work than `largest` evaluations, the most that `fitted` has, are left out:
    their neighbour did less.
    """
    closest: dict[str, tuple[float, Row]] = {}
    for row in rows:
        met = row.against_fitted
        if met is None or not is_within(row, largest):
            continue
        if row.method not in closest or met.ahead_db < closest[row.method][0]:
            closest[row.method] = met.ahead_db, row
    return layout([HEAD, *(_cells(row) for _, row in closest.values())], is_markdown=is_markdown)


def is_within(row: Row, largest: int) -> bool:
    """Whether the row ran and `largest` evaluations are what its work comes to, or more."""
    return row.evaluations is not None and row.evaluations < largest + 1


def remarks(rows: Sequence[Row], *, largest: int) -> list[str]:
    """What is in no table: methods that all their settings keep above `largest`, and errors."""
    within = {row.method for row in rows if is_within(row, largest)}
    least: dict[str, float] = {}
    for row in rows:
        if row.evaluations is not None and row.method not in within:
            least[row.method] = min(row.evaluations, least.get(row.method, row.evaluations))
    errors = dict.fromkeys((row.method, row.error) for row in rows if row.error is not None)
    settings = {key: [r.setting for r in rows if (r.method, r.error) == key] for key in errors}
    return [
        *(f"{method}: {work:.1f} evaluations or more." for method, work in least.items()),
        *(f"{method}, {'; '.join(settings[method, error])}: {error}" for method, error in errors),
    ]


def layout(cells: Sequence[Sequence[str]], *, is_markdown: bool) -> str:
    """Lines of aligned columns, the first of `cells` being their heads."""
    if is_markdown:
        rule = ["---"] * NUMBERS + ["---:"] * (len(cells[0]) - NUMBERS)
        return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(_aligned(row, widths) for row in cells)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    texts = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)][:NUMBERS]
    numbers = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)][NUMBERS:]
    return "  ".join([*texts, *numbers]).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    assert row.evaluations is not None
    assert row.psnr_db is not None
    met = row.against_fitted
    return (
        row.method,
        f"{row.setting} (skips nothing)" if row.is_idle else row.setting,
        f"{row.evaluations:.1f}",
        "–" if row.time is None else f"{row.time:.2f}",
        _psnr(row.psnr_db),
        "–" if row.fine_psnr_db is None else f"{row.fine_psnr_db:.1f}",
        "–" if met is None else f"B = {met.budget}",
        "–" if met is None else _psnr(met.psnr_db),
        "–" if met is None else f"{met.ahead_db:+.1f} ± {met.ahead_error_db:.1f}",
    )


def _psnr(psnr_db: PsnrSummary) -> str:
    return f"{psnr_db.mean:.1f} / {psnr_db.p5:.1f} / {psnr_db.worst:.1f}"
