"""Sigma grids against diffusers' own scheduler, bit for bit."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.sigmas import (
    MuRule,
    SecondStage,
    SigmaGrid,
    check_sigmas,
    dynamic_mu,
    empirical_mu,
    grid_from_config,
    make_grid,
)

STEPS = st.integers(2, 120)
SHIFTS = st.floats(0.3, 15.0, allow_nan=False)
MUS = st.floats(0.05, 3.0)
QWEN = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}

# One diffusers scheduler takes 1 ms to build; no example may be slow enough to matter.
quick = settings(max_examples=60, deadline=None)


def assert_equals_diffusers(
    grid: SigmaGrid,
    config: dict[str, Any],
    *,
    sigmas: NDArray[np.float64] | list[float] | None = None,
    mu: float | None = None,
    sigma_min: float | None = None,
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    if sigma_min is not None:
        scheduler.sigma_min = sigma_min  # as the published Z-Image pipeline did
    count = None if sigmas is not None else grid.steps
    scheduler.set_timesteps(count, sigmas=None if sigmas is None else list(sigmas), mu=mu)
    expected = scheduler.sigmas.numpy(), scheduler.timesteps.numpy()
    found = np.asarray(grid.sigmas, np.float32), np.asarray(grid.timesteps, np.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(grid.array(), found[0].astype(np.float64))


@quick
@given(steps=STEPS, shift=SHIFTS)
def test_static_shift_of_pipeline_sigmas(steps: int, shift: float) -> None:
    sigmas = np.linspace(1.0, 1 / steps, steps)
    assert_equals_diffusers(make_grid(steps, shift=shift), {"shift": shift}, sigmas=sigmas)


@quick
@given(steps=STEPS, mu=MUS, form=st.sampled_from(["exponential", "linear"]))
def test_dynamic_shift(steps: int, mu: float, form: Any) -> None:
    config = {"use_dynamic_shifting": True, "time_shift_type": form}
    sigmas = np.linspace(1.0, 1 / steps, steps)
    grid = make_grid(steps, mu=mu, time_shift_type=form)
    assert_equals_diffusers(grid, config, sigmas=sigmas, mu=mu)


@quick
@given(steps=STEPS, shift=SHIFTS, terminal=st.floats(0.001, 0.3))
def test_stretch_to_a_terminal_sigma(steps: int, shift: float, terminal: float) -> None:
    config = {"shift": shift, "shift_terminal": terminal}
    sigmas = np.linspace(1.0, 1 / steps, steps)
    grid = make_grid(steps, shift=shift, shift_terminal=terminal)
    assert_equals_diffusers(grid, config, sigmas=sigmas)


@quick
@given(steps=STEPS, shift=SHIFTS)
def test_count_convention_is_shifted_twice(steps: int, shift: float) -> None:
    grid = make_grid(steps, convention="count", shift=shift)
    assert_equals_diffusers(grid, {"shift": shift})


@quick
@given(steps=STEPS, shift=SHIFTS)
def test_count_convention_down_to_sigma_zero(steps: int, shift: float) -> None:
    grid = make_grid(steps, convention="count", shift=shift, sigma_min=0.0)
    assert_equals_diffusers(grid, {"shift": shift}, sigma_min=0.0)
    assert grid.sigmas[-2:] == (0.0, 0.0)


@quick
@given(steps=STEPS, mu=MUS, shift=SHIFTS)
def test_count_convention_with_dynamic_shift_ignores_the_static_one(
    steps: int, mu: float, shift: float
) -> None:
    grid = make_grid(steps, convention="count", mu=mu, shift=shift)
    assert_equals_diffusers(grid, {"use_dynamic_shifting": True, "shift": shift}, mu=mu)


@quick
@given(steps=STEPS, shift=SHIFTS)
def test_hunyuan_video_grid_ends_a_step_above_zero(steps: int, shift: float) -> None:
    sigmas = np.linspace(1.0, 0.0, steps + 1)[:-1]
    grid = make_grid(steps, convention="linspace_to_zero", shift=shift)
    assert_equals_diffusers(grid, {"shift": shift}, sigmas=sigmas)


@quick
@given(
    st.lists(st.integers(1, 999), min_size=1, max_size=40, unique=True),
    st.floats(0.5, 8.0),
)
def test_custom_sigmas(thousandths: list[int], shift: float) -> None:
    sigmas = [value / 1000 for value in sorted(thousandths, reverse=True)]
    grid = make_grid(len(sigmas), convention="custom", sigmas=sigmas, shift=shift)
    assert_equals_diffusers(grid, {"shift": shift}, sigmas=sigmas)


WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
}


@quick
@given(steps=STEPS, shift=SHIFTS, terminal=st.none() | st.floats(0.001, 0.3))
def test_flow_sigmas_are_those_of_unipc(steps: int, shift: float, terminal: float | None) -> None:
    options = {**WAN, "flow_shift": shift, "shift_terminal": terminal}
    grid = grid_from_config(options, steps, convention="count")
    options.pop("_class_name")
    scheduler = UniPCMultistepScheduler(**options)
    scheduler.set_timesteps(steps)
    assert grid.convention == "flow_sigmas"
    assert grid.shift == shift
    np.testing.assert_array_equal(np.asarray(grid.sigmas, np.float32), scheduler.sigmas.numpy())
    assert list(grid.timesteps) == scheduler.timesteps.tolist()


@quick
@given(steps=STEPS, mu=MUS, form=st.sampled_from(["exponential", "linear"]))
def test_flow_sigmas_of_a_dynamic_shift(steps: int, mu: float, form: Any) -> None:
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, use_dynamic_shifting=True, time_shift_type=form
    )
    scheduler.set_timesteps(steps, mu=mu)
    grid = make_grid(steps, convention="flow_sigmas", mu=mu, time_shift_type=form)
    np.testing.assert_array_equal(np.asarray(grid.sigmas, np.float32), scheduler.sigmas.numpy())
    assert list(grid.timesteps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_flow_sigmas": False}, "found use_flow_sigmas False"),
        ({"prediction_type": "epsilon"}, "found prediction_type 'epsilon'"),
        ({"final_sigmas_type": "sigma_min"}, "found final_sigmas_type 'sigma_min'"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_another_unipc_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        grid_from_config({**WAN, **options}, 10, convention="count")


def test_an_option_that_is_null_is_off() -> None:
    grid = grid_from_config({**WAN, "use_karras_sigmas": None}, 10, convention="count")
    assert grid == grid_from_config(WAN, 10, convention="count")


def test_unipc_in_a_pipeline_that_hands_over_sigmas_is_refused() -> None:
    with pytest.raises(ScheduleError, match="found one that is given sigmas"):
        grid_from_config(WAN, 10, convention="linspace")


@pytest.mark.parametrize("convention", ["linspace", "linspace_to_zero", "count"])
@pytest.mark.parametrize("shift", [1, 3, 3.0])
def test_a_single_step_goes_from_noise_to_image(convention: Any, shift: float) -> None:
    grid = make_grid(1, convention=convention, shift=shift)
    assert grid.sigmas == (1.0, 0.0)
    assert grid.timesteps == (1000.0,)


@pytest.mark.parametrize("size", [(512, 512), (1328, 1328), (1664, 928)])
def test_config_of_a_resolution_dependent_model(size: tuple[int, int]) -> None:
    height, width = size
    tokens = (height // 16) * (width // 16)
    # Written out from the two published points (256 tokens, 0.5) and (8192 tokens, 0.9).
    mu = 0.5 + (tokens - 256) * 0.4 / (8192 - 256)
    grid = grid_from_config(QWEN, 50, image_tokens=tokens, height=height, width=width)
    assert grid.mu == pytest.approx(mu, rel=1e-14)  # rounding of one line in float64
    assert grid.mu is not None
    assert_equals_diffusers(grid, QWEN, sigmas=np.linspace(1, 1 / 50, 50), mu=grid.mu)


def test_mu_equals_the_pipelines_own() -> None:
    for tokens in (16, 256, 1024, 4096, 9216):
        assert dynamic_mu({}, tokens) == calculate_shift(tokens)


@quick
@given(tokens=st.integers(1, 20_000), steps=st.integers(1, 300))
@example(tokens=4300, steps=28)
@example(tokens=4301, steps=28)
def test_empirical_mu_equals_flux2s_own(tokens: int, steps: int) -> None:
    assert empirical_mu(tokens, steps) == compute_empirical_mu(tokens, steps)


@quick
@given(steps=STEPS, tokens=st.sampled_from([16, 1024, 4096, 4300, 4301, 9216]))
def test_grid_whose_mu_depends_on_the_steps(steps: int, tokens: int) -> None:
    config = {"use_dynamic_shifting": True, "shift": 3.0}
    grid = grid_from_config(config, steps, mu_rule="empirical", image_tokens=tokens)
    assert grid.image_tokens == tokens
    sigmas, mu = np.linspace(1.0, 1 / steps, steps), compute_empirical_mu(tokens, steps)
    assert_equals_diffusers(grid, config, sigmas=sigmas, mu=mu)


def test_a_static_shift_leaves_either_rule_of_mu_without_effect() -> None:
    grids = [
        grid_from_config({"shift": 3.0}, 8, mu_rule=rule, image_tokens=64)
        for rule in get_args(MuRule)
    ]
    assert grids == [make_grid(8, shift=3.0)] * 2


def test_config_of_a_static_model_needs_no_size() -> None:
    grid = grid_from_config({"shift": 7.0, "num_train_timesteps": 500}, 20, convention="count")
    assert grid.shift == 7.0
    assert grid.mu is None
    assert_equals_diffusers(grid, {"shift": 7.0, "num_train_timesteps": 500})


def test_dynamic_grid_down_to_sigma_zero_keeps_zero() -> None:
    grid = make_grid(10, convention="count", mu=0.8, sigma_min=0.0)
    assert grid.sigmas[-2:] == (0.0, 0.0)


@pytest.mark.parametrize(
    "option",
    ["invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"],
)
def test_unsupported_scheduler_options_are_refused_by_name(option: str) -> None:
    with pytest.raises(ScheduleError, match=option):
        grid_from_config({option: True}, 10)


def test_dynamic_shift_without_a_size_is_refused() -> None:
    with pytest.raises(ScheduleError, match="height and width"):
        grid_from_config(QWEN, 10)


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (0, {}, "at least one step"),
        (-3, {}, "at least one step"),
        (4, {"convention": "custom"}, "pass `sigmas`"),
        (2, {"sigmas": [1.0, 0.5]}, "pass `sigmas`"),
        (3, {"convention": "custom", "sigmas": [1.0, 0.5]}, "3 steps has 4 sigmas"),
        (2, {"convention": "custom", "sigmas": [1000.0, 500.0]}, "not timesteps"),
        (2, {"convention": "custom", "sigmas": [0.5, 1.0]}, "must descend"),
        (2, {"convention": "custom", "sigmas": [1.0, float("nan")]}, "finite"),
        (5, {"shift": 0.0}, "positive"),
        (5, {"shift": -1.0}, "positive"),
        (5, {"shift": float("nan")}, "positive"),
        (5, {"mu": -1.0, "time_shift_type": "linear"}, "positive"),
        (5, {"mu": 800.0}, "mu is"),
        (5, {"mu": float("nan")}, "mu is"),
        (5, {"shift_terminal": 1.0}, "shift_terminal"),
        (1, {"shift_terminal": 0.02}, "two steps or more"),
    ],
)
def test_malformed_grids_are_refused(steps: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make_grid(steps, **options)


def test_sigmas_that_repeat_before_the_end_are_refused() -> None:
    check_sigmas([1.0, 0.5, 0.0, 0.0], 3)
    with pytest.raises(ScheduleError, match="only the last may repeat"):
        check_sigmas([1.0, 0.5, 0.5, 0.0], 3)


def test_sigmas_that_are_one_float32_are_refused() -> None:
    # 1e-9 below 0.5 is lost in float32, where a sigma has 24 bits.
    with pytest.raises(ScheduleError, match="must descend"):
        check_sigmas([1.0, 0.5, 0.5 - 1e-9, 0.0], 3)


def test_grid_refuses_timesteps_of_another_length() -> None:
    with pytest.raises(ScheduleError, match="2 timesteps, found 1"):
        SigmaGrid(steps=2, sigmas=(1.0, 0.5, 0.0), timesteps=(1000.0,))


def test_difference_names_the_step_and_both_grids() -> None:
    grid = make_grid(20, shift=3.0)
    assert grid.difference(make_grid(20, shift=3.0)) is None
    assert "shift 3 against 20 steps, shift 4" in str(grid.difference(make_grid(20, shift=4.0)))
    assert grid.difference(make_grid(10, shift=3.0)) == "20 steps against 10"
    other_units = make_grid(20, shift=3.0, num_train_timesteps=1)
    assert "sigma x 1000 against 1" in str(grid.difference(other_units))


def test_difference_compares_frames_where_both_have_them() -> None:
    still, short, long = (make_grid(5, frames=frames) for frames in (None, 17, 61))
    assert short.difference(long) == "17 frames against 61"
    assert still.difference(long) is None


def test_difference_compares_second_stages_where_both_have_them() -> None:
    """A scheduler cannot see where its pipeline changes transformers."""
    stages = [
        SecondStage(boundary_timestep=875.0),
        SecondStage(boundary_timestep=900.0),
        SecondStage(boundary_timestep=875.0, guidance_scale=3.0),
    ]
    unseen, first, later, guided = (make_grid(5, second_stage=stage) for stage in (None, *stages))
    assert first.difference(unseen) is unseen.difference(first) is None
    assert first.difference(later) == ("second stage below timestep 875 against below timestep 900")
    assert first.difference(guided) == (
        "second stage below timestep 875 against below timestep 875, guidance scale 3"
    )


def test_a_grid_of_a_pipeline_has_the_second_stage_it_is_given() -> None:
    stage = SecondStage(boundary_timestep=875.0)
    assert grid_from_config({"shift": 3.0}, 5, second_stage=stage).second_stage == stage


@pytest.mark.parametrize("timestep", [-1.0, float("inf"), float("nan")])
def test_a_boundary_that_is_no_timestep_is_refused(timestep: float) -> None:
    with pytest.raises(ScheduleError, match=f"0 or more and finite, found {timestep:g}"):
        SecondStage(boundary_timestep=timestep)
