"""The rows as tables, for a terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    """Every row, in the order of their methods, each method's by work."""
    order = list(dict.fromkeys(row.method for row in rows))
    ordered = sorted(rows, key=lambda row: (order.index(row.method), row.evaluations or 0.0))
    return layout([HEAD, *map(_cells, _without_repeated_errors(ordered))], is_markdown=is_markdown)


def closest_table(rows: Sequence[Row], *, largest: int, is_markdown: bool) -> str:
    """Of every method the setting that comes closest to `fitted`, or is furthest ahead of it.

    Settings of more work than `largest` evaluations, the most that `fitted` has, are left out:
    their neighbour did less.
    """
    closest: dict[str, Row] = {}
    for row in rows:
        met = row.against_fitted
        if met is None or row.evaluations is None or row.evaluations >= largest + 1:
            continue
        other = closest.get(row.method)
        if other is None or other.against_fitted.ahead_db > met.ahead_db:  # type: ignore[union-attr]
            closest[row.method] = row
    return layout([HEAD, *map(_cells, closest.values())], is_markdown=is_markdown)


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


def _without_repeated_errors(rows: Iterable[Row]) -> list[Row]:
    """One row for all settings of a method that fail alike."""
    kept: list[Row] = []
    for row in rows:
        last = kept[-1] if kept else None
        if row.error and last and (last.method, last.error) == (row.method, row.error):
            continue
        kept.append(row)
    return kept


def _cells(row: Row) -> tuple[str, ...]:
    if row.error is not None or row.psnr_db is None or row.evaluations is None:
        return (row.method, f"{row.setting}: {row.error}", *["–"] * (len(HEAD) - NUMBERS))
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
