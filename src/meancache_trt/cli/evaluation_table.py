"""An evaluation as a table."""

from __future__ import annotations

from meancache_trt.calibration.evaluation import Evaluation, Metric, ReferenceName, Row
from meancache_trt.cli.output import print_table
from meancache_trt.errors import InputError


def print_evaluation(evaluation: Evaluation, reference: ReferenceName) -> None:
    """Print a line for each budget and method, against one of the references."""
    setup = evaluation.setup
    steps = setup.steps if reference == "own" else setup.reference_steps
    columns = [
        *("method", "B", "ms", "PSNR dB", "p5", "worst", "SSIM", "p5", "worst"),
        *("latent error", "p95", "worst", f"PSNR above {evaluation.against}"),
    ]
    rows = sorted(evaluation.rows, key=lambda row: row.budget)
    others = [row for row in (evaluation.full, evaluation.noise_floor) if row]
    print_table(
        columns,
        [_cells(row, reference) for row in (*rows, *others) if row.comparison(reference)],
        title=f"against the model's own {steps} steps"
        if reference == "own"
        else f"against {steps} steps",
    )


def _cells(row: Row, reference: ReferenceName) -> list[str]:
    comparison = row.comparison(reference)
    if comparison is None:
        raise InputError(f"{row.method} at {row.budget} evaluations lacks a comparison")
    return [
        row.method,
        str(row.budget),
        f"{row.ms_per_picture:.1f}",
        *_summary(comparison.psnr, "{:.2f}"),
        *_summary(comparison.ssim, "{:.4f}"),
        *_summary(comparison.latent_error, "{:.4f}"),
        _difference(comparison.psnr),
    ]


def _summary(metric: Metric, form: str) -> list[str]:
    found = metric.summary
    return [form.format(value) for value in (found.mean, found.p5, found.worst)]


def _difference(metric: Metric) -> str:
    """The paired difference with its standard error; empty where there is none."""
    found = metric.difference
    if found is None:
        return ""
    error = "" if found.standard_error is None else f" ± {found.standard_error:.2f}"
    return f"{found.mean:+.2f}{error}"
