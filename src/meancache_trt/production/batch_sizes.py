"""How many pictures at a time: as many as memory holds, while more at a time are still quicker."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.conditioning import joined
from meancache_trt.decoder import PictureDecoder
from meancache_trt.errors import PlanMismatchError
from meancache_trt.graphs import Graphs
from meancache_trt.manifest import Resolution, batch_symbols
from meancache_trt.production.tickets import Group
from meancache_trt.session import Session

DEFAULT_LIMIT = 8
"""The largest batch that is tried where nobody asks for more. On two cores the FLUX.1 stand-in
takes a fifth less time a picture in batches of eight than alone, and hardly less than in fours; a
mid-size model gains nothing (`scripts/prove production`)."""

_WORTH_IT = 0.97
"""A larger batch has to take less than this share of the time a picture: less than noise is no
reason for more memory and for pictures that wait longer."""

_SHARE_OF_FREE = 0.8
"""What batches may use of the memory that is free: the rest is for decoding, writing and others."""

_EVALUATIONS = 5
"""Timed of each size, after one that allocates; the quickest counts, which noise reaches least."""

_ENOUGH_S = 20.0
"""No larger size is tried after that: evaluations that take seconds keep a device busy alone."""


@dataclass(frozen=True)
class Trial:
    """A batch size that was tried: time of one evaluation for each of its pictures.

    Of two transformers that is the mean of an evaluation of each.
    """

    batch: int
    picture_ms: float


def choose_batch(
    graphs: Graphs, group: Group, *, limit: int = DEFAULT_LIMIT, workers: int = 1
) -> tuple[int, list[Trial]]:
    """The batch size for a group on this machine, and what was tried: 1, 2, 4 … up to `limit`.

    `workers` denoise side by side, each with memory of its own. Sizes that plans do not hold are
    left out; on the CPU also those at which pictures differ from what they are alone. Raises
    `PlanMismatchError` where not even some size fits.
    """
    trials: list[Trial] = []
    free, start = graphs.runtime.free_bytes(), time.monotonic()
    problem: PlanMismatchError | None = None
    for batch in sizes_up_to(limit):
        if graphs.runtime.device == "cpu" and not is_exact(graphs, group, batch):
            break
        try:
            trials.append(Trial(batch, _picture_ms(graphs, group, batch)))
        except PlanMismatchError as error:
            problem = error  # below the smallest that is planned, or above the largest
            continue
        used = max(free - graphs.runtime.free_bytes(), 0)
        is_too_large = 2 * used * workers > _SHARE_OF_FREE * free  # with twice the pictures
        if is_too_large or time.monotonic() - start > _ENOUGH_S:
            break
    if not trials:
        assert problem is not None
        raise problem
    best = min(trial.picture_ms for trial in trials)
    chosen = next(trial.batch for trial in trials if _WORTH_IT * trial.picture_ms <= best)
    return chosen, trials


def is_exact(graphs: Graphs, group: Group, batch: int) -> bool:
    """Whether pictures of random inputs have the same bits in batches up to `batch` as alone.

    One evaluation of each transformer at each text length and the decoded pictures are compared.
    ONNX Runtime chooses kernels by shape: on the CPU those of FLUX.1 and Qwen-Image sum in one
    order for any batch, HunyuanVideo's do not at 32 text tokens (1e-5 in the latent).
    """
    random = np.random.default_rng(0)
    for length in graphs.bundle.export.text_lengths:
        resolution = group.resolution.with_text(length)
        blank = blank_conditioning(graphs, resolution, 1)
        samples = [
            {
                name: random.standard_normal(tensor.shape).astype(tensor.dtype)
                if tensor.dtype.kind == "f"
                else tensor
                for name, tensor in blank.items()
            }
            for _ in range(batch)
        ]
        shape = (batch, *resolution.latent_shape)
        latents = random.standard_normal(shape).astype(np.float32)
        alone = [
            _velocities(graphs, group, resolution, latents[i : i + 1], samples[i : i + 1])
            for i in range(batch)
        ]
        for size in range(2, batch + 1):
            found = _velocities(graphs, group, resolution, latents[:size], samples[:size])
            if not np.array_equal(found, np.concatenate(alone[:size])):
                return False
    return batch == 1 or _is_decoded_exactly(graphs, group.resolution, latents)


def _is_decoded_exactly(
    graphs: Graphs, resolution: Resolution, latents: NDArray[np.float32]
) -> bool:
    alone, together = (PictureDecoder(graphs, resolution, batch) for batch in (1, len(latents)))
    singles = [alone.run(latents[i : i + 1]) for i in range(len(latents))]
    return np.array_equal(together.run(latents), np.concatenate(singles))


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
    times, nodes = [], _nodes(group)
    for _ in range(1 + _EVALUATIONS):
        start = time.perf_counter()
        for node in nodes:
            with graphs.runtime.turn():
                session.evaluate(node, latents, conditioning, scale)
        times.append(1e3 * (time.perf_counter() - start) / len(nodes))
    return min(times[1:]) / batch


def _velocities(
    graphs: Graphs,
    group: Group,
    resolution: Resolution,
    latents: NDArray[np.float32],
    samples: Sequence[Mapping[str, NDArray[Any]]],
) -> NDArray[np.float32]:
    session = Session(graphs, group.schedule, resolution, batch=len(latents))
    scale = graphs.bundle.export.guidance.default_scale
    tensors = joined(samples)
    found = [session.evaluate(node, latents, tensors, scale) for node in _nodes(group)]
    return np.stack(found, axis=1)


def _nodes(group: Group) -> list[int]:
    """The first node of each transformer."""
    parts = group.schedule.transformers()
    return [parts.index(part) for part in dict.fromkeys(parts)]


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
