"""Folding itself, and what it asks of nodes and spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.folding import (
    Coefficients,
    Trace,
    check_nodes,
    check_spans,
    fold_steps,
    interval_widths,
    rows_from,
)
from meancache_trt.meancache.methods import METHODS, get_method

GRID = np.linspace(1, 0, 11)
PUBLISHED = [0, 1, 3, 7]


def test_an_estimate_sees_every_step_before_its_own() -> None:
    seen: list[tuple[int, int, int, int]] = []

    def estimate(trace: Trace, step: int, node: int) -> Coefficients:
        seen.append((step, node, len(trace.velocities), len(trace.latents)))
        return trace.velocities[-1]

    fold_steps(np.linspace(1, 0, 7), (0, 2, 5), estimate)
    assert seen == [(1, 0, 1, 2), (3, 1, 3, 4), (4, 1, 4, 5)]


def test_an_estimate_becomes_weights_on_the_velocities_that_it_mixes() -> None:
    def mean_of_last_two_nodes(_trace: Trace, _step: int, node: int) -> Coefficients:
        return np.asarray((np.eye(3)[node] + np.eye(3)[max(node - 1, 0)]) / 2)

    rows = fold_steps(np.array([1.0, 0.75, 0.5, 0.25, 0.0]), (0, 1, 3), mean_of_last_two_nodes)
    # Powers of two, so exact: node 1 takes its own step, and half of the estimated one.
    assert rows == ((-0.25,), (-0.375, -0.125), (-0.25,))


def test_rows_are_youngest_first_without_trailing_zeros() -> None:
    moves = [np.array([-0.5, 0, 0]), np.array([0.1, -0.4, 0]), np.array([0, 0.25, -1.0])]
    assert rows_from(moves) == ((-0.5,), (-0.4, 0.1), (-1.0, 0.25))


def test_a_row_of_zeros_keeps_one_weight() -> None:
    assert rows_from([np.zeros(2), np.zeros(2)]) == ((0.0,), (0.0,))


def test_rounding_residue_is_not_history() -> None:
    assert rows_from([np.array([-1.0, 0]), np.array([1e-16, -1.0])])[1] == (-1.0,)


def test_widths_reach_the_end_of_the_grid() -> None:
    widths = interval_widths(np.array([1.0, 0.5, 0.25, 0.0]), (0, 2))
    assert widths.tolist() == [-0.75, -0.25]


@given(st.sets(st.integers(1, 29)))
def test_ascending_nodes_from_zero_are_accepted(others: set[int]) -> None:
    check_nodes([0, *sorted(others)], 30)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "the list is empty; add node 0"),
        ([1, 2], "begins with 1; add node 0"),
        ([-1, 0], "begins with -1; add node 0"),
        ([0, 5, 3], "found 3 after 5; sort"),
        ([0, 5, 5], "found 5 after 5; sort"),
        ([0, 10], "0 to 9, found 10"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_malformed_nodes_are_refused_by_every_method(
    method: str, nodes: Sequence[int], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        get_method(method).fold(GRID, nodes, [1] * (len(nodes) - 1))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (None, "needs 3 spans"),
        ([1, 1], "need 3 spans, found 2"),
        ([1, 1, 1, 1], "need 3 spans, found 4"),
        ([2, 1, 1], "at node 0 is 1 to 1 .*found 2"),
        ([1, 3, 1], "at node 1 is 1 to 2 .*found 3"),
        ([1, 1, 5], "at node 3 is 1 to 4 .*found 5"),
        ([1, 0, 1], "found 0; 1 reuses"),
        ([1, -2, 1], "found -2; 1 reuses"),
    ],
)
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].uses_spans])
def test_malformed_spans_are_refused(
    method: str, spans: Sequence[int] | None, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        get_method(method).fold(GRID, PUBLISHED, spans)


def test_the_longest_legal_spans_are_accepted() -> None:
    assert check_spans([1, 2, 4], PUBLISHED) == (1, 2, 4, 1)


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].uses_spans])
def test_spans_without_use_are_refused(method: str) -> None:
    with pytest.raises(ScheduleError, match="takes no spans"):
        get_method(method).fold(GRID, PUBLISHED, [1, 1, 1])


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match=r"unknown method 'eulr'.*ab2, .*euler, .*unipc"):
        get_method("eulr")
