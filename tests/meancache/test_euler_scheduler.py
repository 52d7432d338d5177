"""Euler's method on the grid of a pipeline's UniPCMultistepScheduler, and schedules on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from meancache_trt.calibration.recording import RecordingScheduler
from meancache_trt.errors import CalibrationError, ScheduleError
from meancache_trt.export.checkpoint import read_json
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.euler_scheduler import stock_grid
from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import SigmaGrid, grid_from_config, make_grid

STEPS = 20
FLOW: dict[str, Any] = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 5.0,
}


def unipc(**options: Any) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(**{**FLOW, **options})


class Steps:
    def begin(self, *_: Any) -> None: ...
    def add(self, *_: Any) -> None: ...
    def end(self, *_: Any) -> None: ...


def grid(steps: int = STEPS, **options: Any) -> SigmaGrid:
    return make_grid(steps, convention="flow_sigmas", shift=5.0, **options)


@pytest.mark.parametrize("terminal", [None, 0.02])
def test_nodes_are_those_of_the_pipelines_own_grid(terminal: float | None) -> None:
    base, nodes = unipc(shift_terminal=terminal), [0, 3, 11]
    schedule = bake("euler", grid(shift_terminal=terminal), nodes)
    scheduler = MeanCacheScheduler.from_schedule(schedule, base)
    scheduler.set_timesteps(STEPS)
    base.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == base.timesteps[nodes].tolist()
    assert scheduler.sigmas.tolist() == base.sigmas[[*nodes, STEPS]].tolist()
    assert scheduler.schedule == schedule


def test_a_dynamic_shift_is_followed() -> None:
    base = unipc(use_dynamic_shifting=True)
    made = make_grid(STEPS, convention="flow_sigmas", mu=0.8)
    scheduler = MeanCacheScheduler.from_schedule(bake("euler", made, [0, 9]), base)
    scheduler.set_timesteps(STEPS, mu=0.8)
    assert scheduler.schedule.grid == made


def moved(scheduler: Any) -> torch.Tensor:
    latent = torch.ones(2, 3)
    for timestep in scheduler.timesteps:
        velocity = torch.sin(latent + timestep / 1000)
        latent = scheduler.step(velocity, timestep, latent, return_dict=False)[0]
    return latent


# diffusers 0.42.1 hands torch tensors to np.array, which NumPy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 10, 30])
def test_the_unipc_method_does_what_the_pipelines_own_scheduler_does(steps: int) -> None:
    base = unipc()
    schedule = bake("unipc", grid(steps), range(steps))
    scheduler = MeanCacheScheduler.from_schedule(schedule, base)
    for each in (base, scheduler):
        each.set_timesteps(steps)
    # λ in float32 in diffusers: measured 1e-6
    torch.testing.assert_close(moved(scheduler), moved(base), rtol=0, atol=5e-6)


def test_a_saved_scheduler_keeps_the_grid(tmp_path: Path) -> None:
    schedule = bake("unipc", grid(), range(STEPS))
    scheduler = MeanCacheScheduler.from_schedule(schedule, unipc())
    scheduler.save_pretrained(tmp_path)
    loaded = MeanCacheScheduler.from_pretrained(tmp_path)
    for each in (scheduler, loaded):
        each.set_timesteps(STEPS)
    assert loaded.schedule == schedule
    assert torch.equal(moved(loaded), moved(scheduler))
    replaced = MeanCacheScheduler.from_schedule(bake("euler", grid(), [0, 9]), loaded)
    replaced.set_timesteps(STEPS)
    assert replaced.schedule.grid == grid()
    config = read_json(tmp_path / "scheduler_config.json")
    assert grid_from_config(config, STEPS, convention="count") == grid()


def test_a_stock_scheduler_that_was_made_of_unipcs_configuration_has_its_own_grid() -> None:
    stock = FlowMatchEulerDiscreteScheduler.from_config(unipc().config, shift=5.0)
    assert stock.config.use_flow_sigmas  # which it does not know, and keeps
    stock.set_timesteps(STEPS)
    own = make_grid(STEPS, convention="count", shift=5.0)
    scheduler = MeanCacheScheduler.from_schedule(bake("euler", own, [0, 9]), stock)
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == stock.timesteps[[0, 9]].tolist()
    assert scheduler.schedule.grid == own


def test_equal_timesteps_are_told_apart_by_their_order() -> None:
    """Cut to whole numbers, the first two of many steps are both 999."""
    scheduler = RecordingScheduler.around(unipc(), sink=Steps())
    scheduler.set_timesteps(300)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    moved(scheduler)
    assert scheduler.step_index == 300


def test_recordings_are_on_the_pipelines_own_grid() -> None:
    scheduler = RecordingScheduler.around(unipc(), sink=None)
    scheduler.set_timesteps(STEPS)
    assert stock_grid(scheduler, None, None) == grid()


def test_sigmas_are_refused() -> None:
    scheduler = MeanCacheScheduler.from_schedule(bake("euler", grid(), [0, 9]), unipc())
    with pytest.raises(ScheduleError, match="number of steps alone, found sigmas"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_flow_sigmas": False}, "found use_flow_sigmas False"),
        ({"use_karras_sigmas": True}, "found use_karras_sigmas True"),
    ],
)
def test_a_unipc_that_is_not_of_flow_matching_is_an_error(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        MeanCacheScheduler.from_schedule(bake("euler", grid(), [0, 9]), unipc(**options))
    with pytest.raises(CalibrationError, match=message):
        RecordingScheduler.around(unipc(**options), sink=None)
