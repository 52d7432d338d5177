"""The published schedules by name, on the grids of their models."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from meancache_trt.errors import InputError, ScheduleError
from meancache_trt.meancache.presets import preset, preset_names

# How many velocities each reads, counted from the authors' recursion (RESEARCH.md, section 1, has
# the Qwen-Image ones and the bound for Z-Image).
HISTORIES = {
    "Qwen/Qwen-Image:25": 4,
    "Qwen/Qwen-Image:17": 2,
    "Qwen/Qwen-Image:10": 2,
    "Qwen/Qwen-Image-2512:25": 4,
    "Qwen/Qwen-Image-2512:17": 3,
    "Qwen/Qwen-Image-2512:10": 2,
    "Tongyi-MAI/Z-Image:25": 7,
    "Tongyi-MAI/Z-Image:20": 10,
    "Tongyi-MAI/Z-Image:17": 6,
    "Tongyi-MAI/Z-Image:15": 5,
    "Tongyi-MAI/Z-Image:13": 3,
}


def test_all_published_schedules_are_named() -> None:
    assert set(preset_names()) == HISTORIES.keys()


@pytest.mark.parametrize("name", HISTORIES)
def test_preset_is_a_schedule_of_its_budget_and_history(name: str) -> None:
    schedule = preset(name)
    assert schedule.name == name.rpartition("/")[2].replace(":", "-b")
    assert schedule.method == "official"
    assert schedule.grid.steps == 50
    assert schedule.budget == int(name.rpartition(":")[2])
    assert schedule.history == HISTORIES[name]
    assert schedule.model is not None
    assert schedule.model.name == name.rpartition(":")[0]
    assert schedule.nodes[-1] == 49


def test_published_nodes_and_spans_are_kept() -> None:
    schedule = preset("Qwen/Qwen-Image:10")
    assert schedule.nodes == (0, 1, 3, 7, 14, 21, 28, 35, 42, 49)
    assert schedule.spans == (1, 2, 1, 1, 1, 1, 1, 1, 4)


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ({}, (1328, 1328)),
        ({"height": 928}, (928, 1328)),
        ({"height": 928, "width": 1664}, (928, 1664)),
    ],
)
def test_qwen_grid_follows_the_picture_size(size: dict[str, int], pixels: tuple[int, int]) -> None:
    grid = preset("Qwen/Qwen-Image:17", **size).grid
    assert (grid.height, grid.width) == pixels
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    mu = calculate_shift(pixels[0] // 16 * (pixels[1] // 16), 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 50, 50), mu=mu)
    np.testing.assert_array_equal(grid.array(), scheduler.sigmas.numpy())


def test_z_image_grid_reaches_zero_a_step_early() -> None:
    schedule = preset("Tongyi-MAI/Z-Image:13")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.sigma_min = 0.0  # the published scripts set it; current diffusers pipelines do not
    scheduler.set_timesteps(50)
    np.testing.assert_array_equal(schedule.grid.array(), scheduler.sigmas.numpy())
    assert schedule.grid.sigmas[-2:] == (0.0, 0.0)
    assert schedule.weights[-1] == (0.0,)


def test_z_image_grid_does_not_depend_on_the_size() -> None:
    name = "Tongyi-MAI/Z-Image:25"
    assert preset(name, height=512, width=768).grid.sigmas == preset(name).grid.sigmas


def test_preset_fits_another_size_by_refolding() -> None:
    small = preset("Qwen/Qwen-Image:10", height=512, width=512)
    assert preset("Qwen/Qwen-Image:10").fit_to(small.grid, 4.0) == small


@pytest.mark.parametrize("name", ["", "Qwen/Qwen-Image", "Qwen/Qwen-Image:11", ":10", "flux:10"])
def test_unknown_preset_is_refused_with_the_known_names(name: str) -> None:
    with pytest.raises(ScheduleError, match=r"expected one of Qwen/Qwen-Image:25, .*Z-Image:13"):
        preset(name)


@pytest.mark.parametrize(
    ("pixels", "nearest"), [(1000, 992), (1001, 1008), (15, 16), (1, 16), (0, 16), (-32, 16)]
)
@pytest.mark.parametrize("side", ["height", "width"])
def test_size_off_the_token_grid_is_refused_with_the_nearest(
    side: str, pixels: int, nearest: int
) -> None:
    with pytest.raises(InputError, match=f"{side} .*found {pixels}; the nearest is {nearest}$"):
        preset("Tongyi-MAI/Z-Image:13", **{side: pixels})
