"""All weights of a table, fitted in order along the trajectories that the table itself makes.

With nodes fixed, row n is fitted when the network has been evaluated where rows 0 … n − 1 lead: its
weights over the last H velocities bring the latent closest to the recorded one at the next node. So
each row mends what those before it left, and is used as it was fitted.

Samples are held out in folds while this runs: a sample moves by rows that were fitted without its
fold. So one run gives the table and, without a further network evaluation, final latents of samples
that the rows did not see. The table's rows are fitted on all samples, along those same
trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.lockstep import Lockstep, Matrix, OnEnd
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.folding import Rows, interval_widths, rows_from

MAX_HISTORY = 8
"""Velocities that a row reads: those of the update graph for 8, which take as much device memory
as 8 latents."""


@dataclass(frozen=True)
class FitOptions:
    """How rows are fitted.

    `history` is H, 1 to 8 so that a device holds few velocities. `ridge` is what deviating from
    plain reuse costs, relative to the velocities' mean square. `is_consistent` has each row sum to
    σ_next − σ_n, so that a constant velocity is exact (`scripts/prove fitted-schedules` has both).
    `folds` is at most the number of samples, where each is then held out alone; 1 holds nothing
    out.

    Raises `CalibrationError` for values out of range.
    """

    history: int = 6
    ridge: float = 1e-5
    is_consistent: bool = True
    folds: int = 16

    def __post_init__(self) -> None:
        if not (1 <= self.history <= MAX_HISTORY and self.ridge >= 0 and self.folds >= 1):
            raise CalibrationError(
                f"a fit has a history of 1 to {MAX_HISTORY}, a ridge of 0 or more and at least one "
                f"fold, found {self.history}, {self.ridge} and {self.folds}"
            )


@dataclass(frozen=True)
class FittedRows:
    """A table, and what its trajectories showed.

    `errors` (S,) are distances from the recorded final latents as fractions of these, each of a
    sample that was held out. `evaluations` counts samples at nodes; velocities at node 0 are those
    of the recording.
    """

    rows: Rows
    errors: NDArray[np.float64]
    evaluations: int


def fit_row(
    gram: Matrix, width: float, *, ridge: float, is_consistent: bool = False
) -> NDArray[np.float64]:
    """Weights (k,) with the least error, from inner products of k velocities and their target.

    Args:
        gram: (k + 1, k + 1), the target last; summed over samples.
        width: σ_next − σ_n, the weight of the youngest velocity in plain reuse.
        ridge: see `FitOptions`. With 0 the least squares solution of least norm.
        is_consistent: see `FitOptions`.
    """
    count = len(gram) - 1
    inner, target = gram[:count, :count], gram[:count, count]
    reuse = np.append(width, np.zeros(count - 1))
    free = np.eye(count)
    basis = free[:, 1:] - free[:, :1] if is_consistent else free
    level = ridge * np.trace(inner) / count * np.eye(basis.shape[1])
    miss = basis.T @ (target - inner @ reuse)
    change, *_ = np.linalg.lstsq(basis.T @ inner @ basis + level, miss, rcond=None)
    return np.asarray(reuse + basis @ change)


def fit_rows(
    trajectories: Trajectories,
    field: VelocityField,
    nodes: Sequence[int],
    options: FitOptions | None = None,
    on_end: OnEnd | None = None,
) -> FittedRows:
    """Fit a row for each of `nodes`, streaming: a batch of samples is in memory at a time.

    `on_end` is given the final latents of held-out samples.

    Raises:
        CalibrationError: where a single sample is to be held out, a velocity is not finite, or a
            trajectory leaves its recording.
    """
    options = options or FitOptions()
    if len(trajectories) < 2 <= options.folds:
        raise CalibrationError(
            "a fit holds samples out and needs at least 2, found 1; record more, 8 to 16 suffice"
        )
    fit = _Fit(options, interval_widths(trajectories.grid.array(), nodes), len(trajectories))
    lockstep = Lockstep(trajectories, field, nodes, options.history)
    errors = lockstep.run(fit.rule, on_end)
    return FittedRows(_as_rows(fit.table), errors, lockstep.evaluations)


def follow_rows(
    trajectories: Trajectories,
    field: VelocityField,
    nodes: Sequence[int],
    rows: Rows,
    on_end: OnEnd | None = None,
) -> FittedRows:
    """Run a given table on all samples, as `fit_rows` does one that it fits."""
    history = max(map(len, rows))

    def rule(n: int, grams: Matrix) -> Matrix:
        row = np.zeros(grams.shape[1] - 1)
        row[: len(rows[n])] = rows[n]
        return np.broadcast_to(row, (len(grams), len(row)))

    lockstep = Lockstep(trajectories, field, nodes, history)
    return FittedRows(rows, lockstep.run(rule, on_end), lockstep.evaluations)


class _Fit:
    """The rule of one `fit_rows`; `table` are the rows so far, fitted on all samples."""

    def __init__(self, options: FitOptions, widths: NDArray[np.float64], samples: int) -> None:
        folds = min(options.folds, samples)
        self.table: list[NDArray[np.float64]] = []
        self._options, self._widths = options, widths
        self._fold = np.arange(samples) % folds
        everyone = np.ones(samples, bool)
        self._kept = [self._fold != f for f in range(folds)] if folds > 1 else [everyone]

    def rule(self, n: int, grams: Matrix) -> Matrix:
        """See `lockstep.Rule`."""
        self.table.append(self._row(grams, n))
        return np.stack([self._row(grams[kept], n) for kept in self._kept])[self._fold]

    def _row(self, grams: Matrix, n: int) -> NDArray[np.float64]:
        options, width = self._options, float(self._widths[n])
        return fit_row(
            grams.sum(axis=0), width, ridge=options.ridge, is_consistent=options.is_consistent
        )


def _as_rows(table: Sequence[NDArray[np.float64]]) -> Rows:
    """As rows of a schedule; `rows_from` takes displacements over all nodes, oldest first."""
    budget = len(table)
    return rows_from(
        [
            np.concatenate([np.zeros(n + 1 - len(row)), row[::-1], np.zeros(budget - n - 1)])
            for n, row in enumerate(table)
        ]
    )
