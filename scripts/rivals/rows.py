"""What is recorded of each setting: its work, its pictures, and `fitted` at no more work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from scripts.rivals.measure import Measured, Reference, evaluations
from scripts.rivals.subject import STEPS, Run

from meancache_trt.calibration.metrics import PsnrSummary, psnr
from meancache_trt.meancache.schedule import FITTED

ROUNDING = 1e-3
"""Evaluations; what a count may be off a whole number by an embedding that runs once."""


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """`fitted` at `budget` evaluations, and how far it is ahead: paired mean and its error, dB."""

    budget: int
    psnr_db: PsnrSummary
    ahead_db: float
    ahead_error_db: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One setting. PSNR in dB against the reference's 50 steps; `fine` against 200 of them.

    `evaluations` is the mean work over prompts in evaluations of the whole network, `least` and
    `most` its range; `calls` of the transformer at the first prompt. `error` is set instead where
    it did not run.
    """

    method: str
    setting: str
    error: str | None = None
    evaluations: float | None = None
    least: float | None = None
    most: float | None = None
    calls: int | None = None
    time: float | None = None
    psnr_db: PsnrSummary | None = None
    fine_psnr_db: float | None = None
    against_fitted: Against | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing was skipped."""
        return self.evaluations is not None and self.evaluations > STEPS - 0.1


def rows_of(measured: Sequence[Measured], reference: Reference) -> list[Row]:
    """A row for each."""
    fitted = {
        round(evaluations(one.runs, reference.runs)[0]): psnr_of(one.runs, reference.runs)
        for one in measured
        if one.rival.method == FITTED
    }
    return [_row(one, reference, fitted) for one in measured]


def _row(one: Measured, reference: Reference, fitted: Mapping[int, NDArray[np.float64]]) -> Row:
    if one.error is not None:
        return Row(method=one.rival.method, setting=one.rival.setting, error=one.error)
    work = evaluations(one.runs, reference.runs)
    values = psnr_of(one.runs, reference.runs)
    mean = float(np.mean(work))
    return Row(
        method=one.rival.method,
        setting=one.rival.setting,
        evaluations=mean,
        least=min(work),
        most=max(work),
        calls=one.runs[0].calls,
        time=one.time,
        psnr_db=summary(values),
        fine_psnr_db=float(psnr_of(one.runs, reference.fine).mean()),
        against_fitted=against(values, mean, fitted) if one.rival.method != FITTED else None,
    )


def against(
    values: NDArray[np.float64], work: float, fitted: Mapping[int, NDArray[np.float64]]
) -> Against | None:
    """The largest budget of `fitted` that takes no more than `work`, or None.

    `values` and those of `fitted` are PSNR of the same pictures in dB, shape (N,).
    """
    budget = max((b for b in fitted if b <= work + ROUNDING), default=None)
    if budget is None:
        return None
    gaps = fitted[budget] - values
    error = float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else 0.0
    return Against(
        budget=budget,
        psnr_db=summary(fitted[budget]),
        ahead_db=float(gaps.mean()),
        ahead_error_db=error,
    )


def psnr_of(runs: Sequence[Run], references: Sequence[Run]) -> NDArray[np.float64]:
    """PSNR of each run's picture, or video, in dB."""
    stacks = [np.stack([run.pixels for run in stack]) for stack in (runs, references)]
    return psnr(*stacks)


def summary(values: NDArray[np.float64]) -> PsnrSummary:
    """Mean, 5th percentile and worst."""
    return PsnrSummary(
        mean=float(values.mean()), p5=float(np.percentile(values, 5)), worst=float(values.min())
    )
