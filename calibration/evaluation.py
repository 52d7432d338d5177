"""The evaluation file: what methods at several budgets cost and keep, measured on new pictures.

Every picture is compared with the one that the model's own T steps make of the same noise and, if
there is one, with that of a fine reference of many more steps of the same kind of grid: T steps
have an error of their own, which nobody should be rewarded for imitating.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.costs import CostRule, measure_costs
from meancache_trt.calibration.metrics import (
    PairedDifference,
    latent_error,
    paired_difference,
    psnr,
    ssim,
    summarize,
)
from meancache_trt.calibration.trajectories import Prompt, Trajectories
from meancache_trt.errors import InputError
from meancache_trt.meancache.evidence import Evidence, Summary
from meancache_trt.meancache.files import decode_json, encode_json
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.schedule import Schedule

FILE = "evaluation.json"

MetricName = Literal["psnr", "ssim", "latent_error"]
METRICS: tuple[MetricName, ...] = ("psnr", "ssim", "latent_error")
ReferenceName = Literal["own", "fine"]
REFERENCES: tuple[ReferenceName, ...] = ("own", "fine")

Pictures = NDArray[np.float32]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all records of the file have in common."""


class Setup(_Record, frozen=True, kw_only=True):
    """What was rendered, and by what.

    `model` is the checkpoint's name and `digest` that of its transformer; `bundle_id` is None
    where a diffusers pipeline rendered. `renderer` names the runtime with its version. `batch` is
    pictures at a time. `reference_steps` are those of the fine reference, if there is one.
    """

    model: str
    digest: str
    family: str
    bundle_id: str | None
    renderer: str
    threads: int
    batch: int
    height: int
    width: int
    frames: int | None
    frames_per_second: float | None
    steps: int
    reference_steps: int | None
    guidance_scale: float | None
    precision: str
    noise: str


class Machine(_Record, frozen=True, kw_only=True):
    """What it ran on: processor, cores that could be used, system, and packages by name."""

    processor: str
    cores: int
    system: str
    versions: dict[str, str]


class ScheduleFacts(_Record, frozen=True, kw_only=True):
    """What of a schedule an evaluation shows. `sigmas` has one entry for each node."""

    name: str
    digest: str
    steps: int
    nodes: tuple[int, ...]
    sigmas: tuple[float, ...]
    history: int
    calibration: Evidence | None


class Metric(_Record, frozen=True, kw_only=True):
    """One value a picture, and what they come to.

    `difference` is what the values are above those of the compared method at the same budget, on
    the same pictures; None where there is nothing to compare with.
    """

    values: tuple[float, ...]
    summary: Summary
    difference: PairedDifference | None = None


class Comparison(_Record, frozen=True, kw_only=True):
    """PSNR in dB (100 where pictures are equal), SSIM, and the latents' relative l2 error."""

    psnr: Metric
    ssim: Metric
    latent_error: Metric

    def metric(self, name: MetricName) -> Metric:
        """One of the three by its name."""
        metric: Metric = getattr(self, name)
        return metric


class Row(_Record, frozen=True, kw_only=True):
    """One method at one budget: its schedule, its time and its comparison.

    `ms_per_evaluation` is the denoising loop's time divided by pictures and evaluations, of the
    fastest batch: what else runs on a machine only adds to it. `own` is against the model's T
    steps, `fine` against the fine reference.
    """

    method: str
    budget: int
    schedule: ScheduleFacts
    ms_per_evaluation: float
    own: Comparison | None = None
    fine: Comparison | None = None

    @property
    def key(self) -> str:
        """Method and budget as a file name."""
        return row_key(self.method, self.budget)

    @property
    def ms_per_picture(self) -> float:
        """The denoising loop of one picture."""
        return self.ms_per_evaluation * self.budget

    def comparison(self, reference: ReferenceName) -> Comparison | None:
        """Against one of the references, if it was measured."""
        return self.own if reference == "own" else self.fine


class EdgeCostMap(_Record, frozen=True, kw_only=True):
    """Mean edge costs of calibration trajectories: `mean[t][s]` of a jump from step t to s.

    None where there is no edge. `median_variation` is the median over edges of their standard
    deviation over samples as a fraction of their mean; None for one sample.
    """

    cost: str
    samples: int
    sigmas: tuple[float, ...]
    mean: tuple[tuple[float | None, ...], ...]
    median_variation: float | None


class Evaluation(_Record, frozen=True, kw_only=True):
    """`evaluation.json`.

    `full` is the model's own T steps and `noise_floor` the same steps in another precision, as
    `rows` are: methods in their order, each with its budgets ascending. `against` is the method
    that differences are taken from. `notes` say what could not be done, for people.
    """

    schema: Literal["meancache-trt/evaluation/1"] = "meancache-trt/evaluation/1"
    setup: Setup
    machine: Machine
    prompts: tuple[Prompt, ...]
    full: Row
    rows: tuple[Row, ...]
    against: str
    noise_floor: Row | None = None
    edge_costs: EdgeCostMap | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keys = [(row.method, row.budget) for row in self.rows]
        if not keys or len(set(keys)) < len(keys):
            raise InputError(
                f"an evaluation has rows, each method and budget once, found {keys}; evaluate again"
            )
        for row in (self.full, *self.rows):
            self._check_lengths(row)

    def _check_lengths(self, row: Row) -> None:
        found = [row.comparison(name) for name in REFERENCES]
        for metric in (comparison.metric(m) for comparison in found if comparison for m in METRICS):
            if len(metric.values) != len(self.prompts):
                raise InputError(
                    f"expected {len(self.prompts)} values of {row.method} at {row.budget} "
                    f"evaluations, one a picture, found {len(metric.values)}; evaluate again"
                )

    @property
    def methods(self) -> list[str]:
        """Methods in their order."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def budgets(self) -> list[int]:
        """Budgets of any method, ascending."""
        return sorted({row.budget for row in self.rows})

    @property
    def references(self) -> list[ReferenceName]:
        """The references that all rows were compared with."""
        return [name for name in REFERENCES if all(row.comparison(name) for row in self.rows)]

    def row(self, method: str, budget: int) -> Row | None:
        """The row of a method and budget, if there is one."""
        found = (row for row in self.rows if (row.method, row.budget) == (method, budget))
        return next(found, None)


def row_key(method: str, budget: int) -> str:
    """Method and budget as a file name."""
    return f"{method.replace('/', '-')}-b{budget}"


def compare_batches(
    pictures: Pictures, latents: Pictures, other_pictures: Pictures, other_latents: Pictures
) -> Comparison:
    """Compare a batch with its reference; see the metrics for shapes and what they raise."""
    return Comparison(
        psnr=_metric("psnr", psnr(pictures, other_pictures)),
        ssim=_metric("ssim", ssim(pictures, other_pictures)),
        latent_error=_metric("latent_error", latent_error(latents, other_latents)),
    )


def joined(parts: Sequence[Comparison]) -> Comparison:
    """The comparison of batches that follow each other."""

    def metric(name: MetricName) -> Metric:
        return _metric(name, np.concatenate([part.metric(name).values for part in parts]))

    return Comparison(psnr=metric("psnr"), ssim=metric("ssim"), latent_error=metric("latent_error"))


def _metric(name: MetricName, values: NDArray[np.float64]) -> Metric:
    return Metric(
        values=tuple(values.tolist()),
        summary=summarize(values, is_error=name == "latent_error"),
    )


def compared(rows: Iterable[Row], against: str) -> tuple[Row, ...]:
    """The rows with their differences from a method at the same budget, sorted by budget.

    Methods keep their order. Raises `InputError` where no row has that method.
    """
    listed = list(rows)
    order = list(dict.fromkeys(row.method for row in listed))
    if against not in order:
        raise InputError(
            f"differences are taken from one of the evaluated methods, {', '.join(order)}; found "
            f"{against!r}"
        )
    others = {row.budget: row for row in listed if row.method == against}
    listed.sort(key=lambda row: (order.index(row.method), row.budget))
    return tuple(_compared(row, others.get(row.budget)) for row in listed)


def _compared(row: Row, other: Row | None) -> Row:
    is_itself = other is not None and row.method == other.method
    changes = {}
    for name in REFERENCES:
        mine, theirs = row.comparison(name), other.comparison(name) if other else None
        if mine is not None:
            changes[name] = _with_differences(mine, None if is_itself else theirs)
    return msgspec.structs.replace(row, **changes)


def _with_differences(mine: Comparison, theirs: Comparison | None) -> Comparison:
    def metric(name: MetricName) -> Metric:
        found = mine.metric(name)
        pair = [np.array(each.metric(name).values) for each in (mine, theirs) if each]
        difference = paired_difference(*pair) if theirs else None
        return msgspec.structs.replace(found, difference=difference)

    return Comparison(psnr=metric("psnr"), ssim=metric("ssim"), latent_error=metric("latent_error"))


def schedule_facts(schedule: Schedule) -> ScheduleFacts:
    """What an evaluation keeps of a schedule."""
    return ScheduleFacts(
        name=schedule.name,
        digest=digest_of(encode_json(schedule)),
        steps=schedule.grid.steps,
        nodes=schedule.nodes,
        sigmas=tuple(schedule.sigmas()[:-1].tolist()),
        history=schedule.history,
        calibration=schedule.calibration,
    )


def edge_cost_map(trajectories: Trajectories) -> EdgeCostMap:
    """What plain reuse over each possible interval leaves in the latent; see `measure_costs`."""
    rule = CostRule("euler", "displacement", "l2", max_span=1)
    costs = measure_costs(trajectories, trajectories.grid.array(), rule)
    mean, is_edge = costs.mean[..., 0], np.isfinite(costs.mean[..., 0])
    rows = [
        tuple(float(f"{cost:.4g}") if np.isfinite(cost) else None for cost in row) for row in mean
    ]
    is_positive = is_edge & (np.where(is_edge, mean, 0) > 0)
    variation = costs.deviation()[..., 0][is_positive] / mean[is_positive]
    is_known = costs.samples > 1 and len(variation)
    return EdgeCostMap(
        cost=rule.describe(),
        samples=costs.samples,
        sigmas=trajectories.grid.sigmas,
        mean=tuple(rows),
        median_variation=float(np.median(variation)) if is_known else None,
    )


def load_evaluation(path: Path) -> Evaluation:
    """Read and check an evaluation file. Raises `InputError` naming the file and the fault."""
    try:
        return decode_json(path, Evaluation, InputError)
    except InputError as error:
        text = str(error)
        named = text if str(path) in text else f"{path}: {text}"
        raise InputError(named) from error
