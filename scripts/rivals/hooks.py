"""The caches that diffusers itself has: FirstBlockCache, TaylorSeer and MagCache.

Settings are swept so that the work lands between 5 and 25 evaluations of 50 where the cache can go
there; those of the documentation are among them.
"""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from scripts.rivals.rival import Rival
from scripts.rivals.subject import STEPS, Subject

from meancache_trt.calibration.trajectories import Prompt

FIRST_BLOCK_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
TAYLOR_ATTENTION = ((5, 3), (10, 3))
"""(steps from one evaluation to the next, first steps that are all evaluated). Attention layers
alone are forecast unless lite mode is on, which forecasts the network's output."""
TAYLOR_LITE = ((3, 3), (4, 3), (5, 3), (5, 1), (7, 1), (10, 1))
TAYLOR_ORDERS = (1, 2)
MAG_SETTINGS = (
    (0.06, 3, 0.2),
    (0.12, 3, 0.2),
    (0.12, 3, 0.04),
    (0.24, 3, 0.04),
    (0.5, 3, 0.04),
    (0.5, 6, 0.04),
    (1.0, 6, 0.04),
    (2.0, 6, 0.04),
    (1.0, 12, 0.04),
)
"""(threshold, most steps skipped in a row, share of first steps that are all evaluated)."""
MAG_SAMPLES = 4
"""Pictures whose ratios are averaged; the documentation calibrates on one."""


def rivals(calibration: Sequence[Prompt]) -> Iterator[Rival]:
    """Every hook at every setting; MagCache is calibrated on the first of `calibration`."""
    for threshold in FIRST_BLOCK_THRESHOLDS:
        config = partial(FirstBlockCacheConfig, threshold=threshold)
        yield Rival("FirstBlockCache", f"threshold {threshold}", partial(_cached, config))
    for interval, first in TAYLOR_ATTENTION:
        yield _taylor("TaylorSeer hook, attention", 1, interval, first, is_lite=False)
    for order in TAYLOR_ORDERS:
        for interval, first in TAYLOR_LITE:
            name = f"TaylorSeer hook, lite, order {order}"
            yield _taylor(name, order, interval, first, is_lite=True)
    ratios = _MagRatios(calibration[:MAG_SAMPLES])
    for threshold, skipped, kept in MAG_SETTINGS:
        setting = f"threshold {threshold}, at most {skipped} in a row, first {kept:.0%} kept"
        yield Rival("MagCache", setting, partial(_mag, ratios, threshold, skipped, kept))


def _taylor(name: str, order: int, interval: int, first: int, *, is_lite: bool) -> Rival:
    config = partial(
        TaylorSeerCacheConfig,
        cache_interval=interval,
        disable_cache_before_step=first,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=is_lite,
    )
    return Rival(name, f"every {interval} steps after {first}", partial(_cached, config))


@contextlib.contextmanager
def _cached(config: Callable[[], Any], subject: Subject) -> Iterator[int]:
    with enabled(subject, config()):
        yield STEPS


@contextlib.contextmanager
def enabled(subject: Subject, config: Any) -> Iterator[None]:
    """A cache of diffusers on the transformer for the length of the `with`."""
    transformer = subject.pipeline.transformer
    transformer.enable_cache(config)
    try:
        yield
    finally:
        transformer.disable_cache()


@contextlib.contextmanager
def _mag(
    ratios: _MagRatios, threshold: float, skipped: int, kept: float, subject: Subject
) -> Iterator[int]:
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=skipped,
        retention_ratio=kept,
        num_inference_steps=STEPS,
        mag_ratios=ratios.of(subject),
    )
    with enabled(subject, config):
        yield STEPS


class _MagRatios:
    """MagCache's own calibration, run when it is first asked for."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self._ratios: list[float] | None = None

    def of(self, subject: Subject) -> list[float]:
        """Ratios of the residual's magnitude from step to step, mean over pictures."""
        if self._ratios is None:
            self._ratios = calibrated_ratios(subject, self._prompts)
        return self._ratios


def calibrated_ratios(subject: Subject, prompts: Sequence[Prompt]) -> list[float]:
    """What MagCache prints in its calibration mode, averaged over pictures and guidance's halves.

    There is no other way to get them: its state is reset when the last step ends.
    """
    printed = io.StringIO()
    config = MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
    with enabled(subject, config), contextlib.redirect_stdout(printed):
        for prompt in prompts:
            subject.run(prompt, is_counting=False)
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0,")]
    ratios = np.array([ast.literal_eval(line) for line in lines])
    means: list[float] = ratios.mean(axis=0).tolist()
    return means
