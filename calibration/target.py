"""The smallest budget whose pictures are good enough, and how sure that is.

A few held-out samples stand for all prompts to come. Their PSNR is taken as normal with unknown
mean and variance, for which the posterior under Jeffreys' prior is known in closed form; so the
probability that a mean or a percentile reaches the target is counted over draws from it. For a
percentile this is the classical tolerance bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import CalibrationError

DRAWS = 20_000
"""Probabilities of 0.95 are then known to 0.002."""

DEFAULT_CONFIDENCE = 0.95

Result = TypeVar("Result")


@dataclass(frozen=True)
class Goal:
    """A PSNR in dB that the mean has to reach or, with `percentile`, all pictures but those.

    `confidence` is the probability with which it has to hold on further prompts.

    Raises `CalibrationError` for values out of range.
    """

    psnr: float
    percentile: float | None = None
    confidence: float = DEFAULT_CONFIDENCE

    def __post_init__(self) -> None:
        is_percentile = self.percentile is None or 0 < self.percentile < 100
        if not (0 < self.psnr <= 100 and is_percentile and 0 < self.confidence < 1):
            raise CalibrationError(
                "a target is a PSNR above 0 and up to 100 dB, a percentile between 0 and 100 and a "
                f"confidence between 0 and 1, found {self.psnr}, {self.percentile} and "
                f"{self.confidence}"
            )

    def describe(self) -> str:
        """In words, as "35 dB at percentile 5"."""
        where = "on average" if self.percentile is None else f"at percentile {self.percentile:g}"
        return f"{self.psnr:g} dB {where}"


def reached(psnr: NDArray[np.float64], goal: Goal) -> float:
    """How probable it is that the goal holds, given the PSNR of some samples (S,).

    Raises `CalibrationError` for fewer than two samples, which say nothing of their spread.
    """
    count = len(psnr)
    if count < 2:
        raise CalibrationError(
            f"a target needs the spread over samples, found {count}; record more, 16 are usual"
        )
    rng = np.random.default_rng(0)
    spread = psnr.std(ddof=1) * np.sqrt((count - 1) / rng.chisquare(count - 1, DRAWS))
    mean = psnr.mean() + spread / np.sqrt(count) * rng.standard_normal(DRAWS)
    quantile = 0.0 if goal.percentile is None else NormalDist().inv_cdf(goal.percentile / 100)
    return float((mean + quantile * spread >= goal.psnr).mean())


@dataclass(frozen=True)
class Found(Generic[Result]):
    """What was tried at one budget, and how probable it is that the goal holds with it."""

    budget: int
    result: Result
    confidence: float


def smallest_budget(
    measure: Callable[[int], tuple[Result, NDArray[np.float64] | None]], steps: int, goal: Goal
) -> tuple[Found[Result], list[Found[Result]]]:
    """Search budgets 1 to `steps` by bisection, as if PSNR rose with the budget.

    `measure` gives what was made for a budget and the PSNR of held-out samples (S,), or None where
    every step is evaluated and nothing differs. It runs for about log2(steps) budgets.

    Returns:
        The smallest budget found that reaches the goal (all steps do), and all that were tried.
    """
    tried: dict[int, Found[Result]] = {}

    def is_reached(budget: int) -> bool:
        result, psnr = measure(budget)
        tried[budget] = Found(budget, result, 1.0 if psnr is None else reached(psnr, goal))
        return tried[budget].confidence >= goal.confidence

    low, high = 0, steps  # low fails, high is to be the answer
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_reached(middle) else (middle, high)
    if high not in tried:
        is_reached(high)
    return tried[high], [tried[budget] for budget in sorted(tried)]
