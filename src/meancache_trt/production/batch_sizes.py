"""How many pictures at a time: as many as memory holds, while more at a time are still quicker."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import PlanMismatchError
from meancache_trt.graphs import Graphs
from meancache_trt.manifest import Resolution, batch_symbols
from meancache_trt.production.tickets import Group
from meancache_trt.session import Session

DEFAULT_LIMIT = 8
"""The largest batch that is tried where nobody asks for more. On two cores the stand-ins take 19 %
(FLUX.1) to 25 % less time a picture in batches of eight than alone, and 4 to 9 % less than in
fours (`scripts/prove production`)."""

_WORTH_IT = 0.97
"""A larger batch has to take less than this share of the time a picture: less than noise is no
reason for more memory and for pictures that wait longer."""

_SHARE_OF_FREE = 0.8
"""What batches may use of the memory that is free: the rest is for decoding, writing and others."""

_EVALUATIONS = 5
"""Timed of each size, after one that allocates; the quickest counts, which noise reaches least."""


@dataclass(frozen=True)
class Trial:
    """A batch size that was tried: time of one evaluation for each of its pictures."""

    batch: int
    picture_ms: float


def choose_batch(
    graphs: Graphs, group: Group, *, limit: int = DEFAULT_LIMIT, workers: int = 1
) -> tuple[int, list[Trial]]:
    """The batch size for a group on this machine, and what was tried: 1, 2, 4 … up to `limit`.

    `workers` denoise side by side, each with memory of its own. Sizes that plans do not hold are
    left out. Raises `PlanMismatchError` where not even some size fits.
    """
    trials: list[Trial] = []
    free = graphs.runtime.free_bytes()
    problem: PlanMismatchError | None = None
    for batch in sizes_up_to(limit):
        try:
            trials.append(Trial(batch, _picture_ms(graphs, group, batch)))
        except PlanMismatchError as error:
            problem = error  # below the smallest that is planned, or above the largest
            continue
        used = max(free - graphs.runtime.free_bytes(), 0)
        if 2 * used * workers > _SHARE_OF_FREE * free:  # the next has twice the pictures
            break
    if not trials:
        assert problem is not None
        raise problem
    best = min(trial.picture_ms for trial in trials)
    chosen = next(trial.batch for trial in trials if _WORTH_IT * trial.picture_ms <= best)
    return chosen, trials


def sizes_up_to(limit: int) -> list[int]:
    """1, 2, 4 … and the limit itself."""
    powers = [1 << exponent for exponent in range(limit.bit_length()) if 1 << exponent <= limit]
    return powers if powers[-1] == limit else [*powers, limit]


def _picture_ms(graphs: Graphs, group: Group, batch: int) -> float:
    """The time of an evaluation on zeros, with its transfers, for each picture of a batch."""
    with graphs.runtime.turn():
        session = Session(graphs, group.schedule, group.resolution, batch=batch)
    latents = np.zeros((batch, *group.resolution.latent_shape), np.float32)
    conditioning = blank_conditioning(graphs, group.resolution, batch)
    scale = graphs.bundle.export.guidance.default_scale
    times = []
    for _ in range(1 + _EVALUATIONS):
        start = time.perf_counter()
        session.evaluate(0, latents, conditioning, scale)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:]) / batch


def blank_conditioning(
    graphs: Graphs, resolution: Resolution, batch: int
) -> dict[str, NDArray[Any]]:
    """Conditioning of prompts that have all the tokens of the resolution's text length."""
    sizes = {**resolution.symbols, **batch_symbols(batch)}
    inputs = graphs.network("transformer").inputs
    return {
        name: (np.ones if record.role == "text_mask" else np.zeros)(
            record.resolved(sizes), record.dtype
        )
        for name, record in inputs.items()
        if record.role in ("conditioning", "text_mask")
    }
