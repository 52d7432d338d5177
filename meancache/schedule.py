"""The schedule file: which steps evaluate the network, and how each row moves the latent.

A schedule is baked before rendering and holds everything that the loop needs, so that nothing is
decided at run time. Its JSON Schema is `schedule.schema.json` beside this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import InputError, ScheduleError
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.files import decode_json, read_bytes, write_json
from meancache_trt.meancache.folding import Rows, check_nodes
from meancache_trt.meancache.methods import METHODS, get_method
from meancache_trt.meancache.sigmas import SigmaGrid

Version = Literal["meancache-trt/schedule/1"]
VERSION: Version = "meancache-trt/schedule/1"


FLOAT32_MAX = float(np.finfo(np.float32).max)
"""The loop multiplies by float32 weights; a larger one would become infinite there."""


FITTED = "fitted"
"""The method of tables whose weights follow from data, so that they belong to their grid."""


TRANSFORMERS = ("transformer", "transformer_2")
"""What the networks of both stages are called; most models have the first alone."""


INTERCHANGEABLE_PRECISIONS = frozenset({"float32", "bfloat16", "float16"})
"""What schedules may be calibrated in, and networks run in, whichever it is of either.

Measured for float32 and bfloat16 (docs/proof/precision-transfer.json: three models, B = 6 to 15).
On the bfloat16 network, schedules that were fitted to the float32 one keep from 1.0 dB less to
1.0 dB more mean PSNR than those that were fitted to it, 0.1 dB less on average, where the noise
floor is 60 to 64 dB. The same holds of a fit by the bfloat16 network to recordings in float32.
float16 rounds less than bfloat16 does; networks in fewer bits were not measured.
"""


class ModelReference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The checkpoint that a schedule was calibrated on: its name and the digest of its weights."""

    name: str
    digest: str | None = None


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of B rows over a grid of T steps; immutable and valid once constructed.

    `weights[n][j]` multiplies the velocity evaluated j nodes before node n; a short row means
    zeros. `history` is the longest row. `spans` are set for methods that use them.
    `guidance_scale`, `family` and `model` are None where the schedule is not tied to one; a
    schedule that was calibrated for a range of scales has a `guidance_range` instead. `precision`
    is that of the network that it was calibrated with.
    """

    schema: Version = VERSION
    name: str
    family: str | None = None
    model: ModelReference | None = None
    grid: SigmaGrid
    guidance_scale: float | None = None
    guidance_range: tuple[float, float] | None = None
    precision: str = "float32"
    method: str
    nodes: tuple[int, ...]
    spans: tuple[int, ...] | None = None
    history: int
    weights: Rows
    calibration: Evidence | None = None

    def __post_init__(self) -> None:
        check_nodes(self.nodes, self.grid.steps)
        second = self.grid.second_stage and self.grid.second_stage.guidance_scale
        for scale in (self.guidance_scale, *(self.guidance_range or ()), second):
            check_guidance_scale(scale)
        if self.guidance_range is not None and not self.guidance_range[0] < self.guidance_range[1]:
            raise ScheduleError(
                f"a range of guidance scales has the lower one first, found {self.guidance_range}"
            )
        _check_weights(self.weights, len(self.nodes), self.history)
        if self.is_analytic:
            self._check_fold()
        elif self.method != FITTED:
            raise ScheduleError(
                f"unknown method {self.method!r}; expected {FITTED!r} or one of "
                f"{', '.join(METHODS)}"
            )

    @property
    def budget(self) -> int:
        """B, the number of network evaluations an image (guidance not counted twice)."""
        return len(self.nodes)

    @property
    def is_analytic(self) -> bool:
        """Whether the weights follow from grid, nodes and spans alone."""
        return self.method in METHODS

    def sigmas(self) -> NDArray[np.float64]:
        """Sigma at each node, and at the end of the grid last, shape (B + 1,)."""
        return np.append(self.grid.array()[list(self.nodes)], self.grid.sigmas[-1])

    def timesteps(self) -> NDArray[np.float32]:
        """Timestep at each node in the scheduler's units, shape (B,)."""
        return np.asarray(self.grid.timesteps, np.float32)[list(self.nodes)]

    def transformers(self) -> tuple[str, ...]:
        """Which of `TRANSFORMERS` each node evaluates, by its timestep; length B."""
        second = self.grid.second_stage
        if second is None:
            return TRANSFORMERS[:1] * self.budget
        # In float32, where diffusers compares them.
        is_second = self.timesteps() < np.float32(second.boundary_timestep)
        return tuple(TRANSFORMERS[int(later)] for later in is_second)

    def table(self, history: int) -> NDArray[np.float32]:
        """Weights as shape (B, history), zero-padded. `history` is at least the schedule's own."""
        if history < self.history:
            raise ScheduleError(
                f"schedule {self.name!r} reads {self.history} velocities back, found room for "
                f"{history}; history is never truncated, use a larger update graph"
            )
        table = np.zeros((self.budget, history), np.float32)
        for row, weights in zip(table, self.weights, strict=True):
            row[: len(weights)] = weights
        return table

    def fit_to(self, grid: SigmaGrid, guidance_scale: float | None) -> Schedule:
        """Return this schedule for `grid`, refolded where its method allows.

        The second stage is that of `grid`, where it names one.

        Raises:
            ScheduleError: where a fitted table meets another grid, or the schedule belongs to
                another guidance scale.
        """
        self._check_guidance(guidance_scale)
        return self.on_grid(grid)

    def on_grid(self, grid: SigmaGrid) -> Schedule:
        """As `fit_to`, for a host that cannot see the guidance scale."""
        self.check_grid(grid)
        if grid.second_stage is None:
            grid = msgspec.structs.replace(grid, second_stage=self.grid.second_stage)
        if self.grid.difference(grid) is None:
            own = msgspec.structs.replace(self.grid, second_stage=grid.second_stage)
            return self if own == self.grid else msgspec.structs.replace(self, grid=own)
        return bake(
            self.method,
            grid,
            self.nodes,
            self.spans,
            name=self.name,
            family=self.family,
            model=self.model,
            guidance_scale=self.guidance_scale,
            guidance_range=self.guidance_range,
            precision=self.precision,
        )

    def _check_guidance(self, scale: float | None) -> None:
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if scale is None or not low <= scale <= high:
                raise ScheduleError(
                    f"schedule {self.name!r} was calibrated for guidance scales {low:g} to "
                    f"{high:g}, found {scale}; render with one of them or calibrate for {scale}"
                )
        elif self.guidance_scale not in (None, scale):
            raise ScheduleError(
                f"schedule {self.name!r} was calibrated for guidance scale {self.guidance_scale}, "
                f"found {scale}; render with {self.guidance_scale} or calibrate for {scale}"
            )

    def check_grid(self, grid: SigmaGrid) -> None:
        """Raise `ScheduleError` where this is a fitted table of another grid than `grid`."""
        difference = self.grid.difference(grid)
        if difference and (self.calibration is not None or not self.is_analytic):
            raise ScheduleError(
                f"schedule {self.name!r} was calibrated on another grid: {difference}; calibrate "
                "for this grid, or render at the size and number of steps it was made for"
            )

    def check_precision(self, precision: str) -> None:
        """Raise `ScheduleError` where this was calibrated and says nothing of such a network."""
        is_known = {self.precision, precision} <= INTERCHANGEABLE_PRECISIONS
        if self.calibration is not None and self.precision != precision and not is_known:
            raise ScheduleError(
                f"schedule {self.name!r} was calibrated in {self.precision}, this network is "
                f"{precision}; calibrate in {precision}"
            )

    def _check_fold(self) -> None:
        rows = get_method(self.method).fold(self.grid.array(), self.nodes, self.spans)
        table = self.table(max(self.history, *map(len, rows)))
        expected = np.zeros_like(table)
        for target, row in zip(expected, rows, strict=True):
            target[: len(row)] = row
        if not np.allclose(table, expected, rtol=0, atol=1e-6):
            raise ScheduleError(
                f"the weights are not those of method {self.method!r} on this grid with these nodes"
                " and spans; the file was altered, bake it again"
            )


def bake(
    method: str,
    grid: SigmaGrid,
    nodes: Sequence[int],
    spans: Sequence[int] | None = None,
    *,
    name: str | None = None,
    family: str | None = None,
    model: ModelReference | None = None,
    guidance_scale: float | None = None,
    guidance_range: tuple[float, float] | None = None,
    precision: str = "float32",
    calibration: Evidence | None = None,
) -> Schedule:
    """Fold an analytic method into a schedule. Raises `ScheduleError` for malformed input."""
    rows = get_method(method).fold(grid.array(), nodes, spans)
    return Schedule(
        name=name or f"{method}-b{len(nodes)}",
        family=family,
        model=model,
        grid=grid,
        guidance_scale=guidance_scale,
        guidance_range=guidance_range,
        precision=precision,
        method=method,
        nodes=tuple(nodes),
        spans=tuple(spans) if spans is not None else None,
        history=max(map(len, rows)),
        weights=rows,
        calibration=calibration,
    )


def load_schedule(path: Path | str) -> Schedule:
    """Read and validate a schedule file. Raises `ScheduleError` naming the file and the fault."""
    path = Path(path)
    try:
        _check_version(read_bytes(path))
        return decode_json(path, Schedule, ScheduleError)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from error


def save_schedule(schedule: Schedule, path: Path | str) -> None:
    """Write a schedule file atomically, replacing what stands there."""
    write_json(Path(path), schedule)


class _Header(msgspec.Struct):
    schema: object = None


def _check_version(text: bytes) -> None:
    """Name a foreign version before the fields that it adds; other faults are left to the decoder.

    A decoder would also take a file that names no version, since the field has a default.
    """
    try:
        found = msgspec.json.decode(text, type=_Header).schema
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    if found != VERSION:
        raise ScheduleError(
            f"expected a schedule file with schema {VERSION!r}, found {found!r}; bake it again with"
            " this version of meancache-trt"
        )


def check_guidance_scale(scale: float | None) -> None:
    """Raise `InputError` for a scale that is not a number from 0 to 1000."""
    if scale is not None and not 0 <= scale <= 1000:
        raise InputError(f"a guidance scale is 0 to 1000, found {scale}; 1 means no guidance")


def _check_weights(weights: Rows, budget: int, history: int) -> None:
    if len(weights) != budget:
        raise ScheduleError(f"{budget} nodes need {budget} rows of weights, found {len(weights)}")
    for n, row in enumerate(weights):
        if not 1 <= len(row) <= n + 1:
            raise ScheduleError(
                f"row {n} holds 1 to {n + 1} weights (the velocities so far), found {len(row)}"
            )
        if not (np.abs(row) <= FLOAT32_MAX).all():
            raise ScheduleError(
                f"row {n} has a weight that is not a finite float32; bake the schedule again"
            )
    longest = max(map(len, weights))
    if longest != history:
        raise ScheduleError(f"history is the longest row, {longest}, found {history}")
