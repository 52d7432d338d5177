from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meancache_trt.calibration.estimators import ESTIMATORS, weights_of
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.methods import get_method
from meancache_trt.meancache.sigmas import make_grid


@settings(max_examples=15, deadline=None)
@given(
    steps=st.integers(2, 12),
    shift=st.floats(0.5, 6.0),
    max_span=st.integers(1, 6),
    method=st.sampled_from(sorted(ESTIMATORS)),
)
def test_edge_weights_are_the_methods_own_after_a_full_history(
    steps: int, shift: float, max_span: int, method: str
) -> None:
    """Fold a schedule that evaluates every step to t, then skips to s: row t is the edge."""
    sigmas = make_grid(steps, shift=shift).array()
    weights = weights_of(method, sigmas, max_span)
    rule = get_method(method)
    for node in range(steps):
        for target in range(node + 1, steps):
            for span in range(1, min(max_span, node + 1) + 1):
                spans = [*[1] * node, span] if rule.uses_spans else None
                expected = np.zeros(max_span + steps)
                row = rule.fold(sigmas, [*range(node + 1), target], spans)[node]
                expected[: len(row)] = row
                found = np.zeros_like(expected)
                found[: weights.shape[3]] = weights[node, target, span - 1]
                # two float64 sums of at most 12 terms below 1
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_unreachable_edges_have_no_weight() -> None:
    weights = weights_of("official", make_grid(8, shift=3.0).array(), 4)
    assert not weights[3, :4].any()
    assert not weights[1, :, 2:].any()
    assert weights[2, 5, 2].any()


def test_edges_to_the_end_of_a_grid_whose_last_sigma_repeats_are_finite() -> None:
    sigmas = np.array([1.0, 0.6, 0.3, 0.0, 0.0])
    for method in ESTIMATORS:
        assert np.isfinite(weights_of(method, sigmas, 3)).all()


def test_an_unknown_estimator_lists_the_known_ones() -> None:
    with pytest.raises(CalibrationError, match=r"'ab2' has no edge costs.*euler, official, paper"):
        weights_of("ab2", make_grid(4).array(), 2)
