from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meancache_trt.calibration.metrics import compare, psnr
from meancache_trt.errors import InputError


def test_psnr_of_a_constant_difference() -> None:
    references = np.full((3, 4, 5, 3), 0.5)
    pictures = references + np.array([0.1, 0.01, 0.001]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(psnr(pictures, references), [20.0, 40.0, 60.0])


def test_psnr_is_at_most_100_db() -> None:
    pictures = np.full((2, 4), 0.5)
    assert psnr(pictures, pictures + np.array([[0.0], [1e-9]])).tolist() == [100.0, 100.0]


def test_summary_is_per_picture() -> None:
    references = np.zeros((5, 2, 2, 3), np.float32)
    errors = np.array([0.1, 0.1, 0.1, 0.1, 1.0], np.float32)
    summary = compare(references + errors.reshape(5, 1, 1, 1), references)
    assert summary is not None
    # float32 pictures
    assert summary.mean == pytest.approx(16.0, abs=1e-5)
    assert summary.worst == pytest.approx(0.0, abs=1e-5)
    assert summary.p5 == pytest.approx(4.0, abs=1e-5)  # a fifth of the way from 0 to 20 dB


def test_pictures_against_themselves_have_no_psnr() -> None:
    pictures = np.random.default_rng(0).random((2, 8, 8, 3))
    assert compare(pictures, pictures.copy()) is None


ONES = np.ones((2, 4))


@pytest.mark.parametrize(
    ("pictures", "references", "message"),
    [
        (ONES, np.ones((2, 5)), r"\(2, 4\) and \(2, 5\)"),
        (ONES.astype(np.uint8), ONES.astype(np.uint8), "found uint8"),
        (ONES, ONES * 2, r"from 2\.0 to 2\.0"),
        (ONES * np.nan, ONES, "nan"),
        (ONES[:0], ONES[:0], "at least one picture"),
    ],
)
def test_pictures_that_cannot_be_compared_are_errors(
    pictures: Any, references: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare(pictures, references)
