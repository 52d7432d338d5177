"""How close pictures are to their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import InputError, RuntimeUnavailableError
from meancache_trt.meancache.evidence import Summary

MSE_FLOOR = 1e-10
"""Below this two pictures count as equal: 100 dB, far beyond the 8 bits of a PNG (59 dB)."""


SSIM_SIGMA = 1.5
"""Standard deviation in pixels of SSIM's Gaussian window (Wang et al., IEEE TIP 13, 2004)."""

_SSIM_WINDOW = 11  # pixels: 3.5 sigma either side, rounded, as scikit-image makes it


PsnrSummary = Summary
"""PSNR over pictures in dB."""


BOOTSTRAP_DRAWS = 2000
"""Percentiles of 2.5 % then rest on 50 draws."""


class PairedDifference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mean over the same pictures of one metric minus another, and its standard error.

    The standard error is None for a single picture.
    """

    mean: float
    standard_error: float | None


def psnr(pictures: NDArray[Any], references: NDArray[Any]) -> NDArray[np.float64]:
    """PSNR in dB of each picture against its reference, at most 100, shape (N,).

    Args:
        pictures: (N, …), float in [0, 1]; any layout, the same in both.
        references: of the same shape.

    Raises:
        InputError: where there is no picture, shapes differ, or values are not floats in [0, 1].
    """
    _check_pictures(pictures, references)
    squares = (pictures.astype(np.float64) - references.astype(np.float64)) ** 2
    error = squares.reshape(len(squares), -1).mean(axis=1)
    return np.asarray(-10 * np.log10(np.maximum(error, MSE_FLOOR)))


def ssim(pictures: NDArray[Any], references: NDArray[Any]) -> NDArray[np.float64]:
    """Structural similarity of each picture to its reference, 1 where they are equal, shape (N,).

    Wang et al. 2004 with their Gaussian window of 11 pixels, by scikit-image, mean over channels;
    of a video the mean over its frames.

    Args:
        pictures: (N, H, W, C), or (N, frames, H, W, C) of videos; float in [0, 1].
        references: of the same shape.

    Raises:
        InputError: as `psnr`, and for a picture that is smaller than the window.
        RuntimeUnavailableError: where scikit-image is not installed.
    """
    _check_pictures(pictures, references)
    if pictures.ndim not in {4, 5} or min(pictures.shape[-3:-1]) < _SSIM_WINDOW:
        raise InputError(
            "SSIM compares pictures (N, H, W, C) or videos (N, frames, H, W, C) of at least "
            f"{_SSIM_WINDOW} x {_SSIM_WINDOW} pixels, found shape {pictures.shape}; render them "
            "larger"
        )
    frames = [batch.reshape(-1, *batch.shape[-3:]) for batch in (pictures, references)]
    values = [_ssim_of_frame(*pair) for pair in zip(*frames, strict=True)]
    return np.asarray(np.array(values).reshape(len(pictures), -1).mean(axis=1))


def require_ssim() -> None:
    """Raise `RuntimeUnavailableError` where `ssim` lacks its package, before any work."""
    _structural_similarity()


def _structural_similarity() -> Callable[..., Any]:
    try:
        from skimage.metrics import structural_similarity  # noqa: PLC0415  an extra
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"SSIM needs the package scikit-image ({error}); install meancache-trt[evaluate]"
        ) from error
    found: Callable[..., Any] = structural_similarity
    return found


def _ssim_of_frame(frame: NDArray[Any], reference: NDArray[Any]) -> float:
    value = _structural_similarity()(
        # In float64: variances are small differences of squares.
        frame.astype(np.float64),
        reference.astype(np.float64),
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
        data_range=1.0,
        channel_axis=-1,
    )
    return float(value)


def latent_error(latents: NDArray[Any], references: NDArray[Any]) -> NDArray[np.float64]:
    """l2 distance of each latent from its reference, as a fraction of the latter's norm, (N,).

    Raises `InputError` where shapes differ or a reference is zero.
    """
    if latents.shape != references.shape or not latents.size:
        raise InputError(
            f"expected two batches of latents of one shape, found {latents.shape} and "
            f"{references.shape}; render both at the same size"
        )
    found, wanted = (np.float64(batch).reshape(len(batch), -1) for batch in (latents, references))
    norms = np.linalg.norm(wanted, axis=1)
    if not norms.all():
        raise InputError("expected reference latents that are not zero, found one that is")
    return np.asarray(np.linalg.norm(found - wanted, axis=1) / norms)


def summarize(
    values: NDArray[np.float64], *, is_error: bool = False, with_interval: bool = False
) -> Summary:
    """Mean, 5th percentile and worst of (N,) values; `is_error` where less is better.

    `with_interval` adds the bootstrap interval of the mean. Raises `InputError` where there is no
    value.
    """
    if not len(values):
        raise InputError("expected at least one value to summarize, found none")
    worst = values.max() if is_error else values.min()
    return Summary(
        mean=float(values.mean()),
        p5=float(np.percentile(values, 95 if is_error else 5)),
        worst=float(worst),
        interval=bootstrap_interval(values) if with_interval else None,
    )


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The mean of (N,) values with 95 % confidence: percentiles over resampled pictures.

    The same values give the same interval.
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def paired_difference(values: NDArray[np.float64], others: NDArray[np.float64]) -> PairedDifference:
    """How far (N,) values are above others of the same pictures, in the same order.

    Raises `InputError` where their number differs or is zero.
    """
    if values.shape != others.shape or not len(values):
        raise InputError(
            f"expected two metrics of the same pictures, found {len(values)} and {len(others)} "
            "values; measure both on the same prompts and seeds"
        )
    gaps = values - others
    error = float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else None
    return PairedDifference(mean=float(gaps.mean()), standard_error=error)


def compare(pictures: NDArray[Any], references: NDArray[Any]) -> PsnrSummary | None:
    """Summarise `psnr` over the batch, or None where every picture equals its reference.

    Raises `InputError` as `psnr`.
    """
    values = psnr(pictures, references)
    if np.array_equal(pictures, references):
        return None
    return summarize(values)


def _check_pictures(pictures: NDArray[Any], references: NDArray[Any]) -> None:
    if not pictures.size:
        raise InputError("expected at least one picture to compare, found none")
    if pictures.shape != references.shape or pictures.ndim < 2:
        raise InputError(
            f"expected two batches of pictures of one shape, found {pictures.shape} and "
            f"{references.shape}; render both at the same size"
        )
    for batch in (pictures, references):
        _check_range(batch)


def _check_range(batch: NDArray[Any]) -> None:
    is_float = np.issubdtype(batch.dtype, np.floating)
    if not (is_float and batch.min() >= 0 and batch.max() <= 1):
        raise InputError(
            f"expected float pictures in [0, 1], found {batch.dtype} from {batch.min()} to "
            f"{batch.max()}; divide bytes by 255 and check for values that are not finite"
        )
