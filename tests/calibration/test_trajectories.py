from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from meancache_trt.calibration.trajectories import (
    MANIFEST,
    Array,
    OnStep,
    Prompt,
    Settings,
    Trajectories,
    discard,
    load_trajectories,
    record,
)
from meancache_trt.errors import CalibrationError, InputError
from meancache_trt.meancache.schedule import ModelReference
from meancache_trt.meancache.sigmas import SecondStage, make_grid


def test_velocities_integrate_from_the_initial_to_the_final_latent(
    trajectories: Trajectories,
) -> None:
    moves = np.diff(trajectories.grid.array())
    for trajectory in trajectories:
        assert trajectory.velocities.dtype == np.float32
        # float32 velocities of order 1 over 12 steps
        final = trajectory.initial + moves @ trajectory.velocities
        np.testing.assert_allclose(final, trajectory.final, rtol=0, atol=1e-6)


def test_recordings_are_found_again(trajectories: Trajectories, prompts: list[Prompt]) -> None:
    found = load_trajectories(trajectories.directory)
    assert found == trajectories
    assert [trajectory.prompt for trajectory in found] == prompts


def test_an_interrupted_recording_resumes_where_it_stopped(
    tmp_path: Path, settings: Settings, sampler: Any, prompts: list[Prompt]
) -> None:
    def interrupted(prompt: Prompt, on_step: OnStep) -> tuple[Array, Array]:
        if prompt == prompts[2]:
            on_step(0, np.zeros(3, np.float32))
            raise KeyboardInterrupt
        return sampler(prompt, on_step)

    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, settings, interrupted, prompts)
    assert sampler.calls == prompts[:2]
    kept = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}

    done: list[tuple[int, int]] = []
    found = record(tmp_path, settings, sampler, prompts, lambda *counts: done.append(counts))
    assert sampler.calls == prompts
    assert done == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [sample.prompt for sample in found.samples] == prompts
    assert all(file.read_bytes() == data for file, data in kept.items())
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_more_prompts_extend_a_recording(
    trajectories: Trajectories, settings: Settings, sampler: Any, prompts: list[Prompt]
) -> None:
    more = [Prompt("a moon"), prompts[1]]
    found = record(trajectories.directory, settings, sampler, more)
    assert [sample.prompt for sample in found.samples] == more
    assert sampler.calls == [*prompts, more[0]]
    assert len(load_trajectories(trajectories.directory)) == 4


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"x"), Path.unlink])
def test_a_damaged_sample_is_named_when_read_and_recorded_again(
    trajectories: Trajectories,
    settings: Settings,
    sampler: Any,
    prompts: list[Prompt],
    damage: Callable[[Path], None],
) -> None:
    damage(trajectories.directory / trajectories.samples[1].file)
    with pytest.raises(CalibrationError, match=r"complete recording of 'a ring'"):
        list(load_trajectories(trajectories.directory))
    found = record(trajectories.directory, settings, sampler, prompts)
    assert sampler.calls == [*prompts, prompts[1]]
    assert len(list(found)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 6.0}, "guidance scale 3.5 against 6.0"),
        ({"precision": "bfloat16"}, "precision float32 against bfloat16"),
        ({"model": ModelReference(name="b")}, "model None against ModelReference"),
        ({"grid": make_grid(12, shift=5.0)}, "shift 3 against 12 steps, shift 5"),
        ({"grid": make_grid(20, shift=3.0)}, "12 steps against 20"),
        ({"grid": make_grid(12, shift=3.0, height=64)}, "height None against 64"),
        (
            {"grid": make_grid(12, shift=3.0, second_stage=SecondStage(boundary_timestep=875.0))},
            "second stage None against below timestep 875",
        ),
    ],
)
def test_other_settings_are_refused(
    trajectories: Trajectories, sampler: Any, changes: dict[str, Any], message: str
) -> None:
    other = msgspec.structs.replace(trajectories.settings, **changes)
    with pytest.raises(CalibrationError, match=message):
        record(trajectories.directory, other, sampler, [Prompt("a ring")])


def test_a_velocity_that_is_not_finite_names_prompt_and_step(
    tmp_path: Path, settings: Settings, make_sampler: Any, prompts: list[Prompt]
) -> None:
    broken = make_sampler(lambda step, v: v * (np.nan if step == 7 else 1))
    with pytest.raises(CalibrationError, match=r"step 7 for 'a ring' \(seed 0\).*not finite"):
        record(tmp_path, settings, broken, prompts)
    assert list(tmp_path.iterdir()) == []


def test_a_latent_moved_by_something_else_is_refused(
    tmp_path: Path, settings: Settings, make_sampler: Any, prompts: list[Prompt]
) -> None:
    with pytest.raises(CalibrationError, match="away from the final latent"):
        record(tmp_path, settings, make_sampler(lambda _step, v: v * 1.5), prompts)


def test_a_sampler_that_misses_steps_is_refused(
    tmp_path: Path, settings: Settings, prompts: list[Prompt]
) -> None:
    def skipping(prompt: Prompt, on_step: OnStep) -> tuple[Array, Array]:
        on_step(1, np.zeros(3, np.float32))
        raise AssertionError("unreachable")

    def short(prompt: Prompt, on_step: OnStep) -> tuple[Array, Array]:
        on_step(0, np.zeros(3, np.float32))
        return np.zeros(3, np.float32), np.zeros(3, np.float32)

    with pytest.raises(CalibrationError, match=r"expected step 0 of 12.*found step 1"):
        record(tmp_path, settings, skipping, prompts)
    with pytest.raises(CalibrationError, match=r"expected 12 steps.*found 1"):
        record(tmp_path, settings, short, prompts)


def test_one_sample_is_in_memory_at_a_time(trajectories: Trajectories) -> None:
    alive: list[weakref.ref[Any]] = []
    for trajectory in trajectories:
        alive.append(weakref.ref(trajectory))
        del trajectory
        gc.collect()
        assert all(reference() is None for reference in alive)


def test_a_directory_without_recordings_is_an_error(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(InputError, match=MANIFEST):
        load_trajectories(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"{")
    with pytest.raises(CalibrationError, match=MANIFEST):
        load_trajectories(tmp_path)
    (tmp_path / MANIFEST).write_bytes(msgspec.json.encode({"settings": settings}))
    with pytest.raises(CalibrationError, match="no complete sample"):
        load_trajectories(tmp_path)


def test_a_directory_that_cannot_be_made_is_an_error(
    tmp_path: Path, settings: Settings, sampler: Any
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot create"):
        record(tmp_path / "file" / "deeper", settings, sampler, [])


def test_a_failed_first_sample_leaves_no_directory(tmp_path: Path, settings: Settings) -> None:
    def fail(prompt: Prompt, on_step: OnStep) -> tuple[Array, Array]:
        on_step(0, np.zeros(3, np.float32))
        raise KeyboardInterrupt(prompt.text)

    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "new", settings, fail, [Prompt("a moon")])
    assert not (tmp_path / "new").exists()


def test_a_discarded_recording_is_gone_and_nothing_else(trajectories: Trajectories) -> None:
    other = trajectories.directory / "b10.json"
    other.write_text("{}")
    discard(trajectories.directory)
    assert list(trajectories.directory.iterdir()) == [other]
    discard(trajectories.directory)
