from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from scripts.production.latency import predictions, under_load, with_budgets

from meancache_trt.bundle import Bundle
from meancache_trt.render import Pipeline


@pytest.fixture
def small(shared_bundle: Path):
    with (
        with_budgets(shared_bundle, (2, 6)) as copy,
        Pipeline(Bundle.open(copy), threads=1, embedding_cache="off") as pipeline,
    ):
        yield pipeline


def test_predictions_are_compared_with_what_each_budget_took(small):
    found = predictions(small, budgets=(2, 6), jobs=2)
    assert [(row.budget, row.jobs) for row in found] == [(2, 2), (6, 2)]
    assert all(row.predicted_ms > 0 and row.measured_ms > 0 for row in found)
    assert msgspec.json.encode(found)


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_no_job_is_lost_whatever_the_load(small, factor):
    load = under_load(small, factor, jobs=25, budget=2)
    assert load.lost == load.failed == 0
    assert load.done + load.late + load.refused + load.expired == 25
    assert load.p50_ms <= load.p95_ms <= load.p99_ms
