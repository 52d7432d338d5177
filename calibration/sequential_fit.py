"""All weights of a table, fitted in order along the trajectories that the table itself makes.

With nodes fixed, row n is fitted when the network has been evaluated where rows 0 … n − 1 lead: its
weights over the last H velocities bring the latent closest to the recorded one at the next node. So
each row mends what those before it left, and is used as it was fitted.

Samples are held out in folds while this runs: a sample moves by rows that were fitted without its
fold. So one run gives the table and, without a further network evaluation, an error on samples that
the rows did not see. The table's rows are fitted on all samples, along those same trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.costs import gram_matrix
from meancache_trt.calibration.states import SampleStates, sample_states
from meancache_trt.calibration.trajectories import Array, Prompt, Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.folding import Rows, interval_widths, rows_from

MAX_HISTORY = 8
"""Velocities that a row reads: those of the update graph for 8, which take as much device memory
as 8 latents."""

DIVERGED = 10.0
"""A latent this many final latents away from its recording; fits end below 1."""

_LATENT, _TO_GO, _VELOCITIES = 0, 1, 2
"""Slots of a sample's state: where it is, how far the next node of its recording is from there, and
the last H velocities, that of node n in place n mod H."""


@dataclass(frozen=True)
class FitOptions:
    """How rows are fitted.

    `history` is H, 1 to 8 so that a device holds few velocities. `ridge` is what deviating from
    plain reuse costs, relative to the velocities' mean square. `is_consistent` has each row sum to
    σ_next − σ_n, so that a constant velocity is exact (`scripts/prove fitted-schedules` has both).
    `folds` 1 holds nothing out.

    Raises `CalibrationError` for values out of range.
    """

    history: int = 6
    ridge: float = 1e-5
    is_consistent: bool = True
    folds: int = 4

    def __post_init__(self) -> None:
        if not (1 <= self.history <= MAX_HISTORY and self.ridge >= 0 and self.folds >= 1):
            raise CalibrationError(
                f"a fit has a history of 1 to {MAX_HISTORY}, a ridge of 0 or more and at least one "
                f"fold, found {self.history}, {self.ridge} and {self.folds}"
            )


@dataclass(frozen=True)
class FittedRows:
    """A table, and what its trajectories showed.

    `errors` (samples,) are distances from the recorded final latents as fractions of these, each
    of a sample that was held out. `evaluations` counts samples at nodes; velocities at node 0 are
    those of the recording.
    """

    rows: Rows
    errors: NDArray[np.float64]
    evaluations: int


def fit_row(
    gram: NDArray[np.float64], width: float, *, ridge: float, is_consistent: bool = False
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
) -> FittedRows:
    """Fit a row for each of `nodes`, streaming: a batch of samples is in memory at a time.

    Raises:
        CalibrationError: where there are fewer samples than folds, a velocity is not finite, or a
            trajectory leaves its recording.
    """
    options = options or FitOptions()
    if len(trajectories) < options.folds:
        raise CalibrationError(
            f"a fit holds out samples in {options.folds} folds, found {len(trajectories)} samples; "
            "record more, 8 to 16 suffice"
        )
    fit = _Fit(trajectories, field, nodes, options)
    with sample_states(_VELOCITIES + options.history, fit.size) as states:
        return fit.run(states)


class _Fit:
    """One run of `fit_rows`."""

    def __init__(
        self,
        trajectories: Trajectories,
        field: VelocityField,
        nodes: Sequence[int],
        options: FitOptions,
    ) -> None:
        self._trajectories, self._field, self._options = trajectories, field, options
        self._nodes = tuple(nodes)
        self._ends = (*self._nodes[1:], trajectories.grid.steps)
        sigmas = trajectories.grid.array()
        self._steps = np.diff(sigmas)
        self._widths = interval_widths(sigmas, self._nodes)
        self._fold = np.arange(len(trajectories)) % options.folds
        self._norms = np.zeros(len(trajectories))
        self._evaluations = 0
        self.size = trajectories.velocities(0, 0, 1).shape[1]

    def run(self, states: SampleStates) -> FittedRows:
        self._begin(states)
        table: list[NDArray[np.float64]] = []
        moves = np.zeros((self._options.folds, 0))
        for n in range(len(self._nodes)):
            grams = np.stack(
                [g for chunk in self._chunks() for g in self._advance(states, chunk, n, moves)]
            )
            moves = np.stack([self._row(grams[kept], n) for kept in self._kept()])
            table.append(self._row(grams, n))
        errors = np.concatenate([self._end(states, chunk, moves) for chunk in self._chunks()])
        budget = len(self._nodes)
        oldest_first = [
            np.concatenate([np.zeros(n + 1 - len(row)), row[::-1], np.zeros(budget - n - 1)])
            for n, row in enumerate(table)
        ]
        return FittedRows(rows_from(oldest_first), errors, self._evaluations)

    def _begin(self, states: SampleStates) -> None:
        """Every sample at its recorded noise, with the velocity that was recorded there."""
        state = np.zeros((1, _VELOCITIES + self._options.history, self.size), np.float32)
        for sample, trajectory in enumerate(self._trajectories):
            self._norms[sample] = np.linalg.norm(trajectory.final.astype(np.float64))
            if not self._norms[sample] > 0:
                raise CalibrationError(
                    f"the final latent of {trajectory.prompt.text!r} is zero; leave this prompt out"
                )
            state[0, _LATENT] = trajectory.initial
            state[0, _VELOCITIES] = trajectory.velocities[0]
            states.write([sample], state)

    def _advance(
        self, states: SampleStates, samples: Sequence[int], n: int, moves: NDArray[np.float64]
    ) -> list[NDArray[np.float64]]:
        """Move a chunk to node n, evaluate there, and return its inner products for row n."""
        chunk = states.read(samples)
        if n > 0:
            self._move(chunk, samples, n - 1, moves)
            self._check_near(chunk, samples, n)
            chunk[:, self._slot(n)] = self._evaluate(samples, chunk[:, _LATENT], self._nodes[n])
        start, end = self._nodes[n], self._ends[n]
        for state, sample in zip(chunk, samples, strict=True):
            recorded = self._trajectories.velocities(sample, start, end)
            state[_TO_GO] += np.tensordot(self._steps[start:end], recorded, axes=1)
        states.write(samples, chunk)
        order = [*self._past(n), _TO_GO]
        norms = self._norms[list(samples)]
        return [
            gram_matrix(state[order]) / norm**2 for state, norm in zip(chunk, norms, strict=True)
        ]

    def _end(
        self, states: SampleStates, samples: Sequence[int], moves: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Distances from the recorded final latents after the last row."""
        chunk = states.read(samples)
        self._move(chunk, samples, len(self._nodes) - 1, moves)
        self._check_near(chunk, samples, len(self._nodes))
        return self._distances(chunk, samples)

    def _move(
        self, chunk: Array, samples: Sequence[int], n: int, moves: NDArray[np.float64]
    ) -> None:
        """Apply row n of each sample's fold, in place."""
        past = self._past(n)
        for state, sample in zip(chunk, samples, strict=True):
            moved = np.tensordot(moves[self._fold[sample]], state[past], axes=1)
            state[_LATENT] += moved
            state[_TO_GO] -= moved

    def _evaluate(self, samples: Sequence[int], latents: Array, step: int) -> Array:
        prompts = [self._prompt(sample) for sample in samples]
        velocities = self._field(prompts, np.ascontiguousarray(latents), step)
        self._evaluations += len(samples)
        for prompt, velocity in zip(prompts, velocities, strict=True):
            if not np.isfinite(velocity).all():
                raise CalibrationError(
                    f"the velocity at step {step} for {prompt.text!r} (seed {prompt.seed}) has "
                    "values that are not finite; check the model's precision, or leave this prompt "
                    "out"
                )
        return velocities

    def _check_near(self, chunk: Array, samples: Sequence[int], n: int) -> None:
        for sample, distance in zip(samples, self._distances(chunk, samples), strict=True):
            if not distance < DIVERGED:
                prompt = self._prompt(sample)
                raise CalibrationError(
                    f"the trajectory of {prompt.text!r} (seed {prompt.seed}) is {distance:.3g} "
                    f"final latents away from its recording after {n} evaluations; expected less "
                    f"than {DIVERGED:g}. Raise the budget, or leave this prompt out"
                )

    def _distances(self, chunk: Array, samples: Sequence[int]) -> NDArray[np.float64]:
        gaps = np.linalg.norm(chunk[:, _TO_GO].astype(np.float64), axis=1)
        return np.asarray(gaps / self._norms[list(samples)])

    def _row(self, grams: NDArray[np.float64], n: int) -> NDArray[np.float64]:
        width = float(self._widths[n])
        options = self._options
        return fit_row(
            grams.sum(axis=0), width, ridge=options.ridge, is_consistent=options.is_consistent
        )

    def _kept(self) -> list[NDArray[np.bool_]]:
        """For each fold the samples that its rows are fitted on."""
        if self._options.folds == 1:
            return [np.ones(len(self._fold), bool)]
        return [self._fold != fold for fold in range(self._options.folds)]

    def _past(self, n: int) -> list[int]:
        """Slots of the velocities that row n reads, youngest first."""
        return [self._slot(n - age) for age in range(min(n + 1, self._options.history))]

    def _slot(self, n: int) -> int:
        return _VELOCITIES + n % self._options.history

    def _prompt(self, sample: int) -> Prompt:
        return self._trajectories.samples[sample].prompt

    def _chunks(self) -> list[range]:
        count, batch = len(self._norms), self._field.batch
        return [range(first, min(first + batch, count)) for first in range(0, count, batch)]
