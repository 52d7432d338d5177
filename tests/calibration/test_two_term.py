from __future__ import annotations

import numpy as np
import pytest

from meancache_trt.calibration.refit import mean_gram
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.two_term import peak_costs, two_term_edges
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.sigmas import make_grid

STEPS = 8
SIGMAS = make_grid(STEPS, shift=3.0).array()
EDGES = [(0, 0, 1), (0, 0, 5), (3, 1, 2), (4, 3, 4), (7, 7, 1), (5, 2, 3)]


def velocities() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((STEPS, 30))


@pytest.mark.parametrize(("node", "back", "ahead"), EDGES)
@pytest.mark.parametrize("is_consistent", [False, True])
def test_weights_are_those_of_least_squares(
    node: int, back: int, ahead: int, is_consistent: bool
) -> None:
    v, steps = velocities(), np.diff(SIGMAS)
    found = two_term_edges(v @ v.T, SIGMAS, is_consistent=is_consistent, ridge=1e-14)
    target = steps[node : node + ahead] @ v[node : node + ahead]
    width = SIGMAS[node + ahead] - SIGMAS[node]
    columns = [v[node]] if back == 0 else [v[node], v[node - back]]
    if is_consistent:  # the last weight follows from the sum
        differences = np.array([c - columns[-1] for c in columns[:-1]]).reshape(-1, 30)
        solved, *_ = np.linalg.lstsq(differences.T, target - width * columns[-1], rcond=None)
        weights = np.append(solved, width - solved.sum())
    else:
        weights, *_ = np.linalg.lstsq(np.array(columns).T, target, rcond=None)
    wanted = np.append(weights, np.zeros(2 - len(weights)))
    error = np.linalg.norm(wanted[: len(columns)] @ np.array(columns) - target)
    # a closed form of float64 sums against an orthogonal factorisation
    np.testing.assert_allclose(found.weights[node, back, ahead], wanted, atol=1e-10)
    # squares of order 10 that cancel leave 1e-7 after the root
    assert found.costs[node, back, ahead] == pytest.approx(error, abs=3e-7)


def test_edges_are_where_a_node_before_and_a_target_exist() -> None:
    v = velocities()
    costs = two_term_edges(v @ v.T, SIGMAS, longest=4).costs
    assert costs.shape == (STEPS, 5, 5)
    for (node, back, ahead), cost in np.ndenumerate(costs):
        has_before = 1 <= back <= node or node == back == 0
        assert np.isfinite(cost) == (ahead > 0 and node + ahead <= STEPS and has_before)


def test_a_single_step_costs_nothing() -> None:
    v = velocities()
    costs = two_term_edges(v @ v.T, SIGMAS).costs[:, :, 1]
    assert (costs[np.isfinite(costs)] == 0).all()


@pytest.mark.parametrize("is_consistent", [False, True])
def test_a_velocity_linear_in_sigma_is_integrated_exactly(is_consistent: bool) -> None:
    rng = np.random.default_rng(0)
    v = rng.standard_normal(30) + SIGMAS[:-1, None] * rng.standard_normal(30)
    costs = two_term_edges(v @ v.T, SIGMAS, is_consistent=is_consistent, ridge=1e-15).costs
    seconds = costs[:, 1:, 1:]
    assert seconds[np.isfinite(seconds)].max() < 1e-5  # squares of order 10 in float64, their root
    assert costs[0, 0, 4] > 0.05  # one velocity alone cannot


def test_a_ridge_pulls_towards_reuse() -> None:
    v = velocities()
    weights = two_term_edges(v @ v.T, SIGMAS, ridge=1e9).weights
    np.testing.assert_allclose(weights[5, 2, 3], [SIGMAS[8] - SIGMAS[5], 0], atol=1e-6)


def test_a_velocity_that_does_not_change_costs_nothing_whatever_the_weights_share() -> None:
    edges = two_term_edges(np.ones((STEPS, STEPS)), SIGMAS)
    finite = np.isfinite(edges.costs)
    assert edges.costs[finite].max() < 1e-7  # root of rounding
    widths = [SIGMAS[node + ahead] - SIGMAS[node] for node, _, ahead in np.argwhere(finite)]
    np.testing.assert_allclose(edges.weights[finite].sum(-1), widths, atol=1e-9)


def test_peak_costs_are_power_means_over_samples(trajectories: Trajectories) -> None:
    sigmas = trajectories.grid.array()
    edges = two_term_edges(mean_gram(trajectories), sigmas)
    squared, high = peak_costs(trajectories, sigmas, edges, [2.0, 8.0])
    finite = np.isfinite(edges.costs)
    assert (np.isfinite(high) == finite).all()
    # the mean Gram matrix gives the same squares, summed in another order
    np.testing.assert_allclose(squared[finite], edges.costs[finite], rtol=1e-5, atol=1e-7)
    node, back, ahead = 4, 2, 3
    errors = []
    for trajectory in trajectories:
        v = trajectory.velocities.astype(np.float64)
        moved = np.diff(sigmas)[4:7] @ v[4:7]
        moved -= edges.weights[node, back, ahead] @ v[[4, 2]]
        errors.append(np.linalg.norm(moved) / np.linalg.norm(trajectory.final.astype(float)))
    wanted = np.mean(np.array(errors) ** 8) ** (1 / 8)
    assert high[node, back, ahead] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.eye(STEPS - 1), r"Gram matrix of 8 velocities, found shape \(7, 7\)"),
        (np.eye(STEPS) * np.nan, "finite velocities"),
        (np.zeros((STEPS, STEPS)), "not zero"),
    ],
)
def test_a_gram_matrix_that_cannot_be_used_is_an_error(gram: np.ndarray, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        two_term_edges(gram, SIGMAS)
