from __future__ import annotations

import itertools

import numpy as np
import pytest

from meancache_trt.calibration.refit import interval_errors, mean_gram, refit_spans
from meancache_trt.calibration.trajectories import Prompt, Trajectories, Trajectory
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.methods import get_method

NODES = (0, 2, 5, 6, 9)


def test_errors_are_those_of_the_rows_on_recorded_velocities(trajectories: Trajectories) -> None:
    sigmas = trajectories.grid.array()
    rows = get_method("official").fold(sigmas, NODES, (1, 2, 1, 3))
    squares = np.zeros(len(NODES))
    for trajectory in trajectories:
        v = trajectory.velocities.astype(np.float64)
        for n, (start, end) in enumerate(itertools.pairwise([*NODES, 12])):
            moved = np.diff(sigmas)[start:end] @ v[start:end]
            for j, weight in enumerate(rows[n]):
                moved = moved - weight * v[NODES[n - j]]
            squares[n] += (moved @ moved) / np.square(trajectory.final.astype(np.float64)).sum()
    found = interval_errors(mean_gram(trajectories), sigmas, NODES, rows)
    # a difference of squares of order 1 in float64 leaves 1e-8 after the root
    np.testing.assert_allclose(found, np.sqrt(squares / 3), rtol=1e-6, atol=2e-8)


@pytest.mark.parametrize("method", ["official", "paper"])
def test_each_span_is_the_best_after_those_before_it(
    trajectories: Trajectories, method: str
) -> None:
    gram, sigmas = mean_gram(trajectories), trajectories.grid.array()
    spans = refit_spans(method, gram, sigmas, NODES, 4)

    def error(edge: int, tried: tuple[int, ...]) -> float:
        rows = get_method(method).fold(sigmas, NODES, tried)
        return float(interval_errors(gram, sigmas, NODES, rows)[edge])

    assert spans[0] == spans[2] == 1  # no history, and a single step
    for edge in (1, 3):
        others = [
            (*spans[:edge], span, *spans[edge + 1 :])
            for span in range(1, min(4, NODES[edge] + 1) + 1)
        ]
        assert error(edge, spans) <= min(error(edge, tried) for tried in others) * (1 + 1e-8)


def test_a_velocity_that_does_not_change_is_reused(trajectories: Trajectories) -> None:
    sigmas = trajectories.grid.array()
    assert refit_spans("official", np.ones((12, 12)), sigmas, NODES, 4) == (1, 1, 1, 1)


def test_a_gram_needs_samples_with_an_image() -> None:
    zeros = np.zeros((3, 2), np.float32)
    with pytest.raises(CalibrationError, match="at least one trajectory"):
        mean_gram([])
    with pytest.raises(CalibrationError, match="final latent of 'a ring' is zero"):
        mean_gram([Trajectory(Prompt("a ring"), zeros, zeros[0], zeros[0])])
