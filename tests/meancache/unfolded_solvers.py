"""Solvers as their papers and diffusers write them, step by step on latents at the nodes' sigmas.

They share nothing with the package, whose solvers are folded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Field = Callable[[Array, float], Array]


def half_log_snr(sigma: float) -> float:
    """λ = log((1 − σ)/σ), inf at 0."""
    return math.log((1 - sigma) / sigma) if sigma else math.inf


def unfolded_dpmpp2m(levels: Array, field: Field, start: Array) -> Array:
    """DPM-Solver++(2M), midpoint, first and last interval of first order, in exponentials of h."""
    latent, images = start, []
    h_before = math.nan
    for n, (s, t) in enumerate(itertools.pairwise(levels)):
        images.append(latent - s * field(latent, s))
        if t == s:
            continue
        h = half_log_snr(t) - (half_log_snr(s) if s < 1 else -math.inf)
        slope = np.zeros_like(start)
        if 0 < n < len(levels) - 2 and t > 0:
            slope = (images[n] - images[n - 1]) / (h_before / h)
        gained = (1 - t) * math.expm1(-h)
        latent = t / s * latent - gained * images[n] - 0.5 * gained * slope
        h_before = h
    return latent


def unfolded_unipc(levels: Array, field: Field, start: Array) -> Array:
    """UniPC-2, B(h) = e^h − 1: predict, evaluate, correct, with the corrector's system solved."""
    snr = [half_log_snr(min(sigma, 1 - 1e-6)) for sigma in levels]  # finite, as in diffusers
    images: list[Array] = []
    predicted = last = start
    order = 0
    for n, (s, t) in enumerate(itertools.pairwise(levels)):
        image = predicted - s * field(predicted, s)
        corrected = predicted
        if n and s:
            corrected = unipc_step(levels, snr, [*images, image], last, n - 1, order, fresh=True)
        images.append(image)
        order = 2 if 0 < n < len(levels) - 2 and t else 1
        last = corrected
        if t < s:
            predicted = unipc_step(levels, snr, images, corrected, n, order, fresh=False)
        else:
            predicted = corrected
    return predicted


def unipc_step(
    levels: Array,
    snr: Sequence[float],
    images: Sequence[Array],
    latent: Array,
    n: int,
    order: int,
    *,
    fresh: bool,
) -> Array:
    """From node n to the next, with the image seen there where `fresh`."""
    h = snr[n + 1] - snr[n]
    ratios = [(snr[n - 1] - snr[n]) / h] if order == 2 else []
    slopes = [(images[n - 1] - images[n]) / r for r in ratios]
    if fresh:
        slopes.append(images[n + 1] - images[n])
        ratios.append(1.0)
    weights = [0.5]
    if len(slopes) == 2:
        phi_2 = (math.expm1(-h) + h) / h**2
        phi_3 = (-math.expm1(-h) - h + h**2 / 2) / h**3
        right = np.array([phi_2 * h, 2 * phi_3 * h]) / -math.expm1(-h)
        weights = list(np.linalg.solve([[1.0, 1.0], ratios], right))
    bent = sum((w * d for w, d in zip(weights, slopes, strict=False)), np.zeros_like(latent))
    gained = -math.expm1(math.log(levels[n + 1] / levels[n])) if levels[n + 1] else 1.0
    return latent + gained * (images[n] - latent + bent)
