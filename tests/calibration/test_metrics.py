from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from meancache_trt.calibration.metrics import (
    compare,
    latent_error,
    paired_difference,
    psnr,
    ssim,
    summarize,
)
from meancache_trt.errors import InputError, RuntimeUnavailableError


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


def noisy(references: np.ndarray, amount: float) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(references.shape)
    return np.clip(references + amount * noise, 0, 1).astype(np.float32)


@pytest.fixture
def references() -> np.ndarray:
    smooth = np.linspace(0, 6, 4 * 16 * 20 * 3).reshape(4, 16, 20, 3)
    return np.asarray(0.5 + 0.4 * np.sin(smooth), np.float32)


def test_ssim_is_that_of_wang_et_al(references: np.ndarray) -> None:
    pictures = noisy(references, 0.05)
    expected = [
        # The published settings, spelled out: an 11 x 11 Gaussian window, K1 = .01, K2 = .03.
        structural_similarity(
            a, b, win_size=11, gaussian_weights=True, sigma=1.5, K1=0.01, K2=0.03,
            use_sample_covariance=False, data_range=1.0, channel_axis=2,
        )
        for a, b in zip(pictures, references, strict=True)
    ]  # fmt: skip
    # scikit-image was handed float32 here
    np.testing.assert_allclose(ssim(pictures, references), expected, atol=1e-4)
    assert 0.05 < min(expected) < max(expected) < 0.95


def test_ssim_of_a_video_is_the_mean_over_its_frames(references: np.ndarray) -> None:
    pictures = noisy(references, 0.05)
    frames = ssim(pictures, references)
    videos = ssim(pictures.reshape(2, 2, 16, 20, 3), references.reshape(2, 2, 16, 20, 3))
    np.testing.assert_allclose(videos, frames.reshape(2, 2).mean(axis=1), rtol=1e-12)


def test_ssim_of_equal_pictures_is_one(references: np.ndarray) -> None:
    assert ssim(references, references.copy()).tolist() == [1.0] * 4


@pytest.mark.parametrize("shape", [(2, 10, 20, 3), (2, 16, 20)])
def test_ssim_refuses_what_its_window_does_not_fit_on(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="at least 11 x 11 pixels"):
        ssim(np.zeros(shape), np.zeros(shape))


def test_ssim_names_the_extra_that_it_needs(
    references: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(RuntimeUnavailableError, match=r"install meancache-trt\[evaluate\]"):
        ssim(references, references)


def test_latent_error_is_a_fraction_of_the_reference() -> None:
    references = np.array([[3.0, 4.0], [0.0, 2.0]])
    latents = references + np.array([[0.3, 0.4], [0.0, -2.0]])
    np.testing.assert_allclose(latent_error(latents, references), [0.1, 1.0])


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 3), "of one shape"), ((2, 2), "that are not zero")]
)
def test_latents_without_a_reference_are_errors(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        latent_error(np.ones((2, 2)), np.zeros(shape))


def test_one_picture_in_twenty_is_worse_than_p5() -> None:
    values = np.random.default_rng(0).permutation(np.arange(101.0))
    good, errors = summarize(values), summarize(values, is_error=True)
    assert (good.mean, good.p5, good.worst) == (50.0, 5.0, 0.0)
    assert (errors.mean, errors.p5, errors.worst) == (50.0, 95.0, 100.0)


def test_paired_difference_has_the_standard_error_of_its_mean() -> None:
    others = np.array([10.0, 20.0, 30.0])
    found = paired_difference(others + np.array([1.0, 2.0, 3.0]), others)
    assert found.mean == pytest.approx(2.0)
    assert found.standard_error == pytest.approx(1 / 3**0.5)  # deviation 1 over 3 pictures


def test_one_picture_has_no_standard_error() -> None:
    assert paired_difference(np.array([2.0]), np.array([1.0])).standard_error is None


def test_metrics_of_other_pictures_are_not_paired() -> None:
    with pytest.raises(InputError, match="found 2 and 3 values"):
        paired_difference(np.zeros(2), np.zeros(3))
