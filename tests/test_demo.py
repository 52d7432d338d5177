from __future__ import annotations

import pytest

from meancache_trt.demo import compare, contact_sheet
from meancache_trt.standins import DEMO_PROMPTS
from tests.conftest import STEPS


@pytest.fixture(scope="module")
def compared(pipeline):
    conditioning = pipeline.encode(DEMO_PROMPTS[:2])
    return compare(pipeline, conditioning, (STEPS, 10, 6), lambda *_: None)


def test_the_engine_is_called_exactly_as_often_as_the_budget_says(compared):
    rows, _ = compared
    assert [(row.budget, row.engine_calls) for row in rows] == [(50, 50), (10, 10), (6, 6)]


def test_the_full_integration_is_compared_with_itself_as_nothing(compared):
    rows, _ = compared
    assert rows[0].psnr_mean is None
    assert rows[0].psnr_min is None
    assert rows[0].speedup == 1.0


def test_fidelity_falls_with_the_budget_and_the_worst_is_below_the_mean(compared):
    rows, _ = compared
    assert rows[1].psnr_mean > rows[2].psnr_mean > 10
    assert all(row.psnr_min <= row.psnr_mean for row in rows[1:])


def test_the_contact_sheet_has_a_row_a_budget_and_a_column_a_prompt(compared):
    _, renderings = compared
    sheet = contact_sheet(renderings, scale=2)
    width, height = sheet.size
    assert width >= 2 * 2 * 64
    assert height >= 3 * 2 * 64
    assert len(sheet.getcolors(maxcolors=width * height)) > 100  # pictures, not a blank page
