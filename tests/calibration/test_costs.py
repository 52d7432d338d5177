from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meancache_trt.calibration.costs import (
    COLUMNS,
    CostRule,
    Norm,
    Scaling,
    measure_costs,
    velocity_change,
)
from meancache_trt.calibration.estimators import weights_of
from meancache_trt.calibration.trajectories import Prompt, Trajectory
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.sigmas import make_grid

STEPS = 20
SIGMAS = make_grid(STEPS, shift=3.0).array()
NORMS: list[Norm] = ["l1", "l2"]


def trajectory(velocities: NDArray[Any], sigmas: NDArray[np.float64] = SIGMAS) -> Trajectory:
    initial = np.linspace(-2, 2, velocities.shape[1])
    final = initial + np.diff(sigmas) @ velocities
    arrays = (np.asarray(array, np.float32) for array in (velocities, initial, final))
    return Trajectory(Prompt("a ring"), *arrays)


def random_trajectory(seed: int, width: int = 7) -> Trajectory:
    rng = np.random.default_rng(seed)
    return trajectory(rng.standard_normal((STEPS, width)).cumsum(0) / 4 + 1)


def norm(values: NDArray[Any], kind: Norm) -> float:
    return float(np.linalg.norm(np.asarray(values, np.float64), 1 if kind == "l1" else 2))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("method", ["euler", "paper"])
def test_costs_of_a_velocity_linear_in_sigma(method: str, kind: Norm) -> None:
    """v = a + bσ: reuse errs by b·Σ h_i(σ_i − σ_t), and the paper's jump corrects Δ²·JVP of it."""
    a, b = np.array([1.0, -0.5, 2.0]), np.array([0.5, 1.5, -1.0])
    recorded = trajectory(a + np.outer(SIGMAS[:-1], b))
    rule = CostRule(method, "relative", kind, max_span=3)
    costs = measure_costs([recorded], SIGMAS, rule).mean
    h = np.diff(SIGMAS)
    for node, target in [(0, 5), (4, 6), (6, 19), (10, 14)]:
        for span in (1, 2, 3):
            inside = slice(node, target)
            missed = h[inside] @ (SIGMAS[inside] - SIGMAS[node])
            if method == "paper" and span > 1 and node >= span:
                past = slice(node - span, node)
                window = SIGMAS[node] - SIGMAS[node - span]
                slope = h[past] @ (SIGMAS[past] - SIGMAS[node - span]) / window**2
                missed -= (SIGMAS[target] - SIGMAS[node]) ** 2 * slope
            moved = a * h[inside].sum() + b * (h[inside] @ SIGMAS[inside])
            expected = norm(missed * b, kind) / norm(moved, kind)
            if span <= node + 1:
                # velocities are stored as float32
                assert costs[node, target, span - 1] == pytest.approx(expected, abs=2e-6)


def test_reuse_costs_by_hand() -> None:
    sigmas = np.array([1.0, 0.5, 0.0])
    recorded = trajectory(np.array([[1.0, 2.0], [3.0, 1.0]]), sigmas)
    # From 0 to the end: moves by (−2, −1.5), reuse by (−1, −2). The final latent is (−4, 0.5).
    relative = measure_costs([recorded], sigmas, CostRule("euler", "relative", "l1", 1))
    weighted = measure_costs([recorded], sigmas, CostRule("euler", "displacement", "l2", 1))
    assert relative.mean[0, 2, 0] == pytest.approx(1.5 / 3.5, abs=1e-6)
    assert weighted.mean[0, 2, 0] == pytest.approx(np.sqrt(1.25 / 16.25), abs=1e-6)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("scaling", ["displacement", "relative"])
@pytest.mark.parametrize("method", ["euler", "official", "paper"])
def test_costs_equal_the_error_of_each_jump(method: str, scaling: Scaling, kind: Norm) -> None:
    recorded = random_trajectory(0, width=COLUMNS + 5)
    rule = CostRule(method, scaling, kind, max_span=4)
    costs = measure_costs([recorded], SIGMAS, rule).mean
    weights = weights_of(method, SIGMAS, 4)
    v, h = recorded.velocities.astype(np.float64), np.diff(SIGMAS)
    for node in range(STEPS):
        for target in range(node + 1, STEPS + 1):
            moved = h[node:target] @ v[node:target]
            scale = norm(moved if scaling == "relative" else recorded.final, kind)
            for span in range(1, min(4, node + 1) + 1):
                row = weights[node, target, span - 1, : node + 1]
                expected = norm(moved - row @ v[node::-1][: len(row)], kind) / scale
                if target < STEPS or span == 1:
                    # l1 works in float32 on velocities of order 1
                    assert costs[node, target, span - 1] == pytest.approx(expected, abs=1e-6)


def test_edges_that_do_not_exist_are_infinite_and_single_steps_are_free() -> None:
    costs = measure_costs([random_trajectory(0)], SIGMAS, CostRule("official")).mean
    node, target, span = np.ogrid[:STEPS, : STEPS + 1, 1:7]
    exists = (target > node) & (span <= node + 1) & ((target < STEPS) | (span == 1))
    assert np.array_equal(np.isfinite(costs), exists)
    assert (costs[exists & (target == node + 1)] == 0).all()
    assert (costs[exists & (target > node + 1)] > 0).all()


def test_mean_and_deviation_are_those_over_samples() -> None:
    samples = [random_trajectory(seed) for seed in range(5)]
    rule = CostRule("official", max_span=3)
    alone = np.stack([measure_costs([sample], SIGMAS, rule).mean for sample in samples])
    together = measure_costs(samples, SIGMAS, rule)
    edges = np.isfinite(alone[0])
    np.testing.assert_allclose(together.mean[edges], alone.mean(0)[edges], rtol=1e-12)
    # one sum of squares against a two-pass deviation, in float64
    expected = alone[:, edges].std(0, ddof=1)
    np.testing.assert_allclose(together.deviation()[edges], expected, rtol=1e-6, atol=1e-12)
    assert together.samples == 5


def test_costs_along_a_schedule() -> None:
    costs = measure_costs([random_trajectory(0)], SIGMAS, CostRule("official"))
    m = costs.mean
    assert costs.along((0, 4, 9), (1, 3)) == (m[0, 4, 0], m[4, 9, 2], m[9, STEPS, 0])
    assert costs.along((0, 4), None) == (m[0, 4, 0], m[4, STEPS, 0])


def test_trajectories_are_streamed() -> None:
    alive: list[weakref.ref[Trajectory]] = []

    def stream() -> Iterator[Trajectory]:
        for seed in range(4):
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 1
            sample = random_trajectory(seed)
            alive.append(weakref.ref(sample))
            yield sample
            del sample

    assert measure_costs(stream(), SIGMAS, CostRule("official")).samples == 4


def test_velocity_change_by_hand() -> None:
    recorded = trajectory(np.array([[1.0, 3.0], [2.0, 3.0], [2.0, 0.5]]), SIGMAS[:4])
    np.testing.assert_allclose(velocity_change([recorded]), [1 / 4, 2.5 / 5])


@pytest.mark.parametrize("measure", [velocity_change, lambda t: measure_costs(t, SIGMAS, RULE)])
def test_no_trajectories_is_an_error(measure: Any) -> None:
    with pytest.raises(CalibrationError, match="at least one trajectory"):
        measure([])


RULE = CostRule("euler", max_span=1)


def test_trajectories_of_another_grid_are_an_error() -> None:
    other = trajectory(np.ones((3, 2)), SIGMAS[:4])
    with pytest.raises(CalibrationError, match="expected trajectories of 20 steps, found 3"):
        measure_costs([other], SIGMAS, RULE)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_cost_that_is_not_finite_is_an_error() -> None:
    velocities = random_trajectory(0).velocities.copy()
    velocities[4] = np.nan
    with pytest.raises(CalibrationError, match=r"recording of 'a ring' \(seed 0\).*not finite"):
        measure_costs([trajectory(velocities)], SIGMAS, RULE)
