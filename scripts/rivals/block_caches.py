"""cache-dit: DBCache alone and with its TaylorSeer calibrator, dynamic and with a static mask.

DBCache runs the first blocks at every step, compares their residual with that of the last full
evaluation, and reuses or forecasts the rest. A static mask says beforehand which steps are
evaluated in full; the first blocks run at the others too. Needs the `rivals` extra.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from scripts.rivals.rival import Rival
from scripts.rivals.subject import STEPS, Subject

ORDERS = (0, 1, 2)
"""Of the forecast; 0 reuses, as DBCache alone does."""
EVEN_MASKS = (12,)
NAMED_MASKS = ("ultra",)
"""cache-dit's own masks; this one evaluates fewest steps, 14 of 50."""


@dataclass(frozen=True)
class Setting:
    """cache-dit's `Fn`, `Bn`, warm-up steps, most cached steps in a row (-1 any), threshold."""

    first_blocks: int
    last_blocks: int
    warmup: int
    in_a_row: int
    threshold: float

    def __str__(self) -> str:
        row = "" if self.in_a_row < 0 else f", at most {self.in_a_row} in a row"
        blocks = f"F{self.first_blocks}B{self.last_blocks}"
        return f"{blocks}, threshold {self.threshold}, warm-up {self.warmup}{row}"


SETTINGS = (
    Setting(8, 0, 8, -1, 0.08),  # cache-dit's defaults
    Setting(1, 0, 8, -1, 0.1),
    Setting(1, 0, 4, -1, 0.1),
    Setting(1, 0, 4, -1, 0.2),
    Setting(1, 0, 4, 2, 0.4),
    Setting(1, 0, 4, 4, 0.4),
    Setting(1, 0, 2, 6, 0.4),
)


def rivals(nodes: Mapping[int, Sequence[int]]) -> Iterator[Rival]:
    """Every order at every setting. `nodes` are a calibrated schedule's by budget, as masks."""
    masks = {f"mask, {count} even steps": even_mask(count) for count in EVEN_MASKS}
    masks |= {
        f"mask, {count} nodes of `fitted`": node_mask(chosen) for count, chosen in nodes.items()
    }
    for order in ORDERS:
        name = f"cache-dit DBCache + TaylorSeer {order}" if order else "cache-dit DBCache"
        for setting in SETTINGS:
            yield Rival(name, str(setting), partial(_dynamic, order, setting))
        for text, mask in masks.items():
            yield Rival(name, text, partial(_static, order, mask))
        for mask_name in NAMED_MASKS:
            yield Rival(name, f"mask, {mask_name!r}", partial(_named_mask, order, mask_name))


def even_mask(count: int) -> list[int]:
    """1 at `count` evenly spaced steps, the first among them."""
    return node_mask([index * STEPS // count for index in range(count)])


def node_mask(nodes: Sequence[int]) -> list[int]:
    """1 at the nodes."""
    return [int(step in nodes) for step in range(STEPS)]


@contextlib.contextmanager
def _dynamic(order: int, setting: Setting, subject: Subject) -> Iterator[int]:
    from cache_dit import DBCacheConfig  # noqa: PLC0415  (optional; patches loggers)

    config = DBCacheConfig(
        Fn_compute_blocks=setting.first_blocks,
        Bn_compute_blocks=setting.last_blocks,
        max_warmup_steps=setting.warmup,
        max_continuous_cached_steps=setting.in_a_row,
        residual_diff_threshold=setting.threshold,
        num_inference_steps=STEPS,
    )
    with enabled(subject, config, order):
        yield STEPS


@contextlib.contextmanager
def _static(order: int, mask: list[int], subject: Subject) -> Iterator[int]:
    from cache_dit import DBCacheConfig  # noqa: PLC0415

    config = DBCacheConfig(
        Fn_compute_blocks=1,
        steps_computation_mask=mask,
        steps_computation_policy="static",
        num_inference_steps=STEPS,
    )
    with enabled(subject, config, order):
        yield STEPS


@contextlib.contextmanager
def _named_mask(order: int, name: str, subject: Subject) -> Iterator[int]:
    from cache_dit import steps_mask  # noqa: PLC0415

    with _static(order, steps_mask(total_steps=STEPS, mask_policy=name), subject) as steps:
        yield steps


@contextlib.contextmanager
def enabled(subject: Subject, config: object, order: int) -> Iterator[None]:
    """cache-dit on the pipeline for the length of the `with`.

    It replaces `__call__` of the pipeline's class and `forward` of the transformer, and puts both
    back when it is disabled.
    """
    import cache_dit  # noqa: PLC0415

    forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    with _quiet():
        cache_dit.enable_cache(subject.pipeline, cache_config=config, calibrator_config=forecast)
    try:
        yield
    finally:
        with _quiet():
            cache_dit.disable_cache(subject.pipeline)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the dozen lines that each switch logs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
