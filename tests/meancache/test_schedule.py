"""What a schedule gives the loop, and the grids, scales and precisions that it belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tests.meancache.schedules import (
    GRID,
    NODES,
    SCHEDULES,
    SPANS,
    calibrated,
    fitted,
    official,
)

from meancache_trt.errors import InputError, ScheduleError
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import SecondStage, make_grid


def test_table_is_float32_and_padded_to_the_history_asked_for() -> None:
    schedule = official()
    table = schedule.table(8)
    assert table.dtype == np.float32
    assert table.shape == (5, 8)
    for row, weights in zip(table, schedule.weights, strict=True):
        np.testing.assert_array_equal(row[: len(weights)], np.array(weights, np.float32))
        assert not row[len(weights) :].any()


def test_history_is_never_truncated() -> None:
    schedule = official()
    assert schedule.history > 1
    with pytest.raises(ScheduleError, match="never truncated"):
        schedule.table(schedule.history - 1)


def test_sigmas_and_timesteps_are_those_of_the_nodes() -> None:
    schedule = official()
    expected = [GRID.sigmas[node] for node in NODES]
    assert schedule.sigmas().tolist() == [*expected, 0.0]
    assert schedule.timesteps().tolist() == [GRID.timesteps[node] for node in NODES]
    assert schedule.timesteps().dtype == np.float32


# ------------------------------------------------------------------------------ another grid


def test_an_analytic_schedule_is_refolded_for_another_grid() -> None:
    other = make_grid(20, shift=5.0)
    fitted_to = official().fit_to(other, 7.0)
    assert fitted_to == bake("official", other, NODES, SPANS)
    assert fitted_to.weights != official().weights


def test_refolding_keeps_what_the_schedule_is_tied_to() -> None:
    tied = msgspec.structs.replace(calibrated(), calibration=None)
    fields = ("name", "family", "model", "guidance_scale", "precision", "nodes", "spans", "method")
    refolded = tied.fit_to(GRID, 3.5)
    assert refolded.grid == GRID
    assert [getattr(refolded, name) for name in fields] == [getattr(tied, name) for name in fields]


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_fits_is_returned_as_it_is(make: Callable[[], Schedule]) -> None:
    schedule = make()
    assert schedule.fit_to(schedule.grid, 3.5) is schedule


@pytest.mark.parametrize("make", [calibrated, fitted])
@pytest.mark.parametrize(
    ("grid", "difference"),
    [
        (make_grid(20, shift=5.0), "sigma .* against .* at step"),
        (make_grid(21, shift=3.0), "20 steps against 21"),
    ],
)
def test_a_calibrated_schedule_refuses_another_grid(
    make: Callable[[], Schedule], grid: Any, difference: str
) -> None:
    with pytest.raises(ScheduleError, match=f"another grid: {difference}"):
        make().fit_to(grid, 3.5)


def test_a_calibrated_schedule_refuses_another_number_of_frames() -> None:
    longer = msgspec.structs.replace(calibrated().grid, frames=17)
    with pytest.raises(ScheduleError, match="9 frames against 17"):
        calibrated().fit_to(longer, 3.5)


@pytest.mark.parametrize("scale", [6.0, None])
def test_a_schedule_refuses_another_guidance_scale(scale: float | None) -> None:
    with pytest.raises(ScheduleError, match=rf"guidance scale 3\.5, found {scale}"):
        calibrated().fit_to(calibrated().grid, scale)


def test_refolding_onto_a_grid_that_is_too_short_is_refused() -> None:
    with pytest.raises(ScheduleError, match="0 to 9, found 14"):
        official().fit_to(make_grid(10), None)


# ------------------------------------------------------------------------------ scales, precisions


def test_a_schedule_for_a_range_serves_every_scale_in_it() -> None:
    ranged = msgspec.structs.replace(fitted(), guidance_range=(2.0, 6.0))
    for scale in (2.0, 3.5, 6.0):
        assert ranged.fit_to(GRID, scale) == ranged
    for scale in (1.9, 6.1, None):
        with pytest.raises(ScheduleError, match=rf"scales 2 to 6, found {scale}; render with one"):
            ranged.fit_to(GRID, scale)
    assert ranged.on_grid(GRID) == ranged


def test_a_range_of_impossible_scales_is_refused() -> None:
    with pytest.raises(InputError, match="0 to 1000, found 2000"):
        msgspec.structs.replace(fitted(), guidance_range=(2.0, 2000.0))


@pytest.mark.parametrize(
    ("made", "run", "is_taken"),
    [
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("float16", "bfloat16", True),
        ("float8", "float8", True),
        ("float32", "float8", False),
        ("int8", "bfloat16", False),
    ],
)
def test_what_was_calibrated_serves_networks_of_a_near_precision(
    made: str, run: str, is_taken: bool
) -> None:
    schedule = msgspec.structs.replace(calibrated(), precision=made)
    refusal = pytest.raises(ScheduleError, match=f"calibrated in {made}, this network is {run};")
    with contextlib.nullcontext() if is_taken else refusal:
        schedule.check_precision(run)


def test_what_was_not_calibrated_serves_networks_of_any_precision() -> None:
    msgspec.structs.replace(official(), precision="float8").check_precision("int4")


# ------------------------------------------------------------------------------ two transformers


def staged(boundary: float, schedule: Schedule | None = None) -> Schedule:
    stage = SecondStage(boundary_timestep=boundary, guidance_scale=3.0)
    schedule = schedule or official()
    grid = msgspec.structs.replace(schedule.grid, second_stage=stage)
    return msgspec.structs.replace(schedule, grid=grid)


def test_each_row_names_its_transformer_as_the_pipeline_would_choose_it() -> None:
    timesteps = [GRID.timesteps[node] for node in NODES]
    for boundary in (0.0, timesteps[-1], timesteps[2], timesteps[2] + 1e-3, 1000.0, 1001.0):
        # WanPipeline: `if t >= boundary_timestep` it is the first, t being a float32 tensor.
        expected = [
            "transformer" if torch.tensor(timestep) >= boundary else "transformer_2"
            for timestep in timesteps
        ]
        assert staged(boundary).transformers() == tuple(expected)
    assert official().transformers() == ("transformer",) * len(NODES)


def test_a_schedule_takes_the_second_stage_of_the_grid_that_it_is_fitted_to() -> None:
    for make in SCHEDULES.values():
        here, plain = staged(500.0, make()), make()
        assert plain.fit_to(here.grid, 3.5) == here
        assert here.fit_to(plain.grid, 3.5) is here
    unseen = make_grid(20, shift=2.0)
    assert staged(500.0).on_grid(unseen).grid.second_stage == staged(500.0).grid.second_stage
    moved = staged(600.0).grid
    assert staged(500.0).fit_to(moved, None) == bake("official", moved, NODES, SPANS)
    for make in (calibrated, fitted):
        with pytest.raises(ScheduleError, match="second stage below timestep 500, guidance scale"):
            staged(500.0, make()).fit_to(staged(600.0, make()).grid, 3.5)


def test_a_second_guidance_scale_is_a_scale() -> None:
    stage = SecondStage(boundary_timestep=500.0, guidance_scale=-1.0)
    with pytest.raises(InputError, match="0 to 1000, found -1"):
        bake("euler", make_grid(20, second_stage=stage), [0])
