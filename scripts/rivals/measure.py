"""Run everything on the same prompts and noise, and check that it leaves the pipeline as it was."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scripts.rivals.rival import Rival
from scripts.rivals.subject import STEPS, Run, Subject, own_transformer
from scripts.rivals.work import probing

from meancache_trt.build import Note

FINE_STEPS = 200
TIMED_PROMPTS = 3
"""Timed without counting, which takes time itself; everything in turn on each, then the median."""


class LeftoverError(Exception):
    """A rival changed the pipeline for those after it, so that nothing can be compared."""


@dataclass(frozen=True)
class Reference:
    """The pipeline's own `STEPS` steps of each prompt, and `FINE_STEPS` of them."""

    runs: list[Run]
    fine: list[Run]


@dataclass(frozen=True)
class Measured:
    """One rival's runs of the prompts, or the error that it raised.

    `time` is that of the denoising loop as a fraction of the reference's.
    """

    rival: Rival
    runs: list[Run]
    time: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Blocks:
    """A list of transformer blocks: its name, and each block's share of one evaluation's work."""

    name: str
    shares: list[float]


def reference(subject: Subject) -> Reference:
    """Integrate every prompt with the stock scheduler, counted."""
    return Reference(
        runs=[subject.run(prompt) for prompt in subject.prompts],
        fine=[subject.run(prompt, FINE_STEPS, is_counting=False) for prompt in subject.prompts],
    )


def measure(subject: Subject, rivals: Sequence[Rival], note: Note) -> list[Measured]:
    """Every rival on every prompt. One that raises is recorded with its error.

    Raises `LeftoverError`.
    """
    stock = subject.run(subject.prompts[0], steps=2)
    measured = []
    for rival in rivals:
        note(f"{rival.method}: {rival.setting}")
        measured.append(_all_prompts(subject, rival))
        after = subject.run(subject.prompts[0], steps=2)
        if after.flops != stock.flops or not np.array_equal(after.pixels, stock.pixels):
            raise LeftoverError(f"{rival.method} ({rival.setting}) did not leave the pipeline")
    times = _times(subject, [one.rival for one in measured if one.error is None], note)
    return [Measured(one.rival, one.runs, times.get(one.rival), one.error) for one in measured]


def _all_prompts(subject: Subject, rival: Rival) -> Measured:
    try:
        with own_transformer(subject), rival.applied(subject) as steps:
            return Measured(rival, [subject.run(prompt, steps) for prompt in subject.prompts])
    except Exception as error:  # a rival may raise anything
        return Measured(rival, [], error=f"{type(error).__name__}: {error}".strip(": "))


def _times(subject: Subject, rivals: Sequence[Rival], note: Note) -> dict[Rival, float]:
    """Seconds as a fraction of the stock loop's in the same round, median over rounds."""
    ratios: dict[Rival, list[float]] = {rival: [] for rival in rivals}
    for index, prompt in enumerate(subject.prompts[:TIMED_PROMPTS]):
        note(f"timing, round {index + 1} of {TIMED_PROMPTS}")
        stock = subject.run(prompt, is_counting=False).seconds
        for rival in rivals:
            with own_transformer(subject), rival.applied(subject) as steps:
                ratios[rival].append(subject.run(prompt, steps, is_counting=False).seconds / stock)
    return {rival: statistics.median(of_rival) for rival, of_rival in ratios.items()}


def blocks(subject: Subject) -> list[Blocks]:
    """How an evaluation's work is spread over the transformer's blocks, in their order."""
    transformer = subject.pipeline.transformer
    return [
        Blocks(name, [_share(subject, block) for block in children])
        for name, children in transformer.named_children()
        if isinstance(children, torch.nn.ModuleList) and name.endswith("blocks")
    ]


def _share(subject: Subject, block: torch.nn.Module) -> float:
    with probing(block, is_counting=True) as probe:
        whole = subject.run(subject.prompts[0], steps=2)
    return probe.flops / whole.flops


def evaluations(runs: Sequence[Run], references: Sequence[Run]) -> list[float]:
    """Work of each run in evaluations: 1 is a step's share of the reference, guidance included."""
    return [STEPS * run.flops / whole.flops for run, whole in zip(runs, references, strict=True)]
