"""All samples moved through a table in step: row n of every sample before row n + 1 of any.

So a rule can look at all samples before it says what row n is. State lies in a file and a batch of
samples is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.costs import gram_matrix
from meancache_trt.calibration.states import SampleStates, sample_states
from meancache_trt.calibration.trajectories import Array, Prompt, Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.errors import CalibrationError

DIVERGED = 10.0
"""A latent this many final latents away from its recording; tables in use end below 1."""

Matrix = NDArray[np.float64]

Rule = Callable[[int, Matrix], Matrix]
"""(n, grams) -> weights (S, k) by which each of the S samples moves from node n, youngest first.

`grams` (S, k + 1, k + 1) are inner products, over the squared norm of the final latent, of the last
k velocities, youngest first, and, last, of what is missing to the recording at the next node."""

OnEnd = Callable[[Sequence[int], Array], None]
"""(samples, their final latents (n, N) float32); called for a batch at a time, each sample once."""

_LATENT, _TO_GO, _VELOCITIES = 0, 1, 2
"""Slots of a sample's state: where it is, how far the next node of its recording is from there, and
the last H velocities, that of node n in place n mod H."""


class Lockstep:
    """Runs over `nodes` with at most `history` velocities a row, each from the recorded noise.

    `evaluations` counts samples at nodes; velocities at node 0 are those of the recording.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        field: VelocityField,
        nodes: Sequence[int],
        history: int,
    ) -> None:
        self.evaluations = 0
        self._trajectories, self._field, self._history = trajectories, field, history
        self._nodes = tuple(nodes)
        self._ends = (*self._nodes[1:], trajectories.grid.steps)
        self._steps = np.diff(trajectories.grid.array())
        self._norms = np.zeros(len(trajectories))

    def run(self, rule: Rule, on_end: OnEnd | None = None) -> NDArray[np.float64]:
        """Move all samples; return their distances (S,) from the recorded final latents.

        Distances are fractions of the final latents' norms.

        Raises:
            CalibrationError: where a velocity is not finite, a final latent is zero, or a sample
                leaves its recording.
        """
        size = self._trajectories.velocities(0, 0, 1).shape[1]
        with sample_states(_VELOCITIES + self._history, size) as states:
            self._begin(states, size)
            moves, batches = np.zeros((0, 0)), chunks(len(self._norms), self._field.batch)
            for n in range(len(self._nodes)):
                advanced = [self._advance(states, chunk, n, moves) for chunk in batches]
                moves = rule(n, np.concatenate(advanced))
            return np.concatenate([self._end(states, chunk, moves, on_end) for chunk in batches])

    def _begin(self, states: SampleStates, size: int) -> None:
        """Every sample at its recorded noise, with the velocity that was recorded there."""
        state = np.zeros((1, _VELOCITIES + self._history, size), np.float32)
        for sample in range(len(self._norms)):
            final = self._trajectories.final(sample)
            self._norms[sample] = np.linalg.norm(final.astype(np.float64))
            if not self._norms[sample] > 0:
                text = self._prompt(sample).text
                raise CalibrationError(
                    f"the final latent of {text!r} is zero; leave this prompt out"
                )
            state[0, _LATENT] = self._trajectories.initial(sample)
            state[0, _VELOCITIES] = self._trajectories.velocities(sample, 0, 1)[0]
            states.write([sample], state)

    def _advance(
        self, states: SampleStates, samples: Sequence[int], n: int, moves: Matrix
    ) -> Matrix:
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
        return np.stack(
            [gram_matrix(state[order]) / norm**2 for state, norm in zip(chunk, norms, strict=True)]
        )

    def _end(
        self, states: SampleStates, samples: Sequence[int], moves: Matrix, on_end: OnEnd | None
    ) -> NDArray[np.float64]:
        chunk = states.read(samples)
        self._move(chunk, samples, len(self._nodes) - 1, moves)
        self._check_near(chunk, samples, len(self._nodes))
        if on_end is not None:
            on_end(samples, np.ascontiguousarray(chunk[:, _LATENT]))
        return self._distances(chunk, samples)

    def _move(self, chunk: Array, samples: Sequence[int], n: int, moves: Matrix) -> None:
        """Apply row n, in place."""
        past = self._past(n)
        for state, sample in zip(chunk, samples, strict=True):
            moved = np.tensordot(moves[sample], state[past], axes=1)
            state[_LATENT] += moved
            state[_TO_GO] -= moved

    def _evaluate(self, samples: Sequence[int], latents: Array, step: int) -> Array:
        prompts = [self._prompt(sample) for sample in samples]
        velocities = self._field(prompts, np.ascontiguousarray(latents), step)
        self.evaluations += len(samples)
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

    def _past(self, n: int) -> list[int]:
        """Slots of the velocities that row n reads, youngest first."""
        return [self._slot(n - age) for age in range(min(n + 1, self._history))]

    def _slot(self, n: int) -> int:
        return _VELOCITIES + n % self._history

    def _prompt(self, sample: int) -> Prompt:
        return self._trajectories.samples[sample].prompt


def chunks(samples: int, batch: int) -> list[range]:
    """Indices of all samples, at most `batch` at a time."""
    return [range(first, min(first + batch, samples)) for first in range(0, samples, batch)]
