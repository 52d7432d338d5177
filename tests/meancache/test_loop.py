from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.numpy_runtime import NumpyRuntime, guiding_update_graph, network_graph, update_graph

from meancache_trt.errors import RenderError, ScheduleError
from meancache_trt.meancache.loop import DenoisingLoop, Network
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import SecondStage, make_grid

GRID = make_grid(20, shift=3.0)
SHAPE = (2, 3, 4)


def curved(latent: NDArray[np.float32], timestep: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.tanh(latent) * (1 + timestep[:, None, None] ** 2) - np.float32(0.3)


def noise(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def make_loop(schedule: Schedule, history: int = 4, velocity=curved) -> DenoisingLoop:
    network = Network(
        network_graph(velocity), "hidden_states", "timestep", "velocity", timestep_scale=1 / 1000
    )
    return DenoisingLoop(
        NumpyRuntime(),
        {"transformer": network},
        update_graph(history),
        schedule=schedule,
        latent_shape=SHAPE,
        constants={},
    )


def run(loop: DenoisingLoop, latent: NDArray[np.float32]) -> NDArray[np.float32]:
    loop.initial.write(latent)
    loop.run()
    return loop.result()


def reference(schedule: Schedule, latent: NDArray[np.float32]) -> NDArray[np.float32]:
    """The table applied literally, with the whole history kept."""
    velocities: list[NDArray[np.float32]] = []
    for timestep, row in zip(schedule.timesteps(), schedule.table(schedule.budget), strict=True):
        fed = np.full(SHAPE[0], float(timestep) / 1000, np.float32)
        velocities.insert(0, curved(latent, fed))
        for weight, velocity in zip(row, velocities, strict=False):
            latent = latent + weight * velocity
    return latent


@pytest.mark.parametrize(
    ("method", "nodes", "spans"),
    [
        ("euler", [0, 5, 11], None),
        ("euler", [0, 5, 11, 16], None),
        ("ab2", [0, 2, 7, 12, 18], None),
        ("taylor2", [0, 1, 3, 6, 11, 15], None),
        ("official", [0, 1, 4, 8, 9, 14], [1, 2, 1, 4, 1]),
        ("paper", [0, 2, 5, 9, 14], [1, 2, 3, 2]),
    ],
)
def test_loop_applies_the_table(method, nodes, spans):
    schedule = bake(method, GRID, nodes, spans)
    # The same float32 operations in the same order, so equal to the last bit.
    assert np.array_equal(run(make_loop(schedule), noise()), reference(schedule, noise()))


def test_history_survives_more_evaluations_than_there_are_slots():
    schedule = bake("taylor2", GRID, list(range(0, 20, 2)))
    assert schedule.history == 3
    assert np.array_equal(run(make_loop(schedule, 4), noise()), reference(schedule, noise()))


def test_a_larger_update_graph_gives_the_same_latent():
    schedule = bake("official", GRID, [0, 1, 4, 8, 9, 14], [1, 2, 1, 4, 1])
    small, large = (run(make_loop(schedule, history), noise()) for history in (4, 16))
    assert np.array_equal(small, large)


def test_a_second_image_does_not_see_the_first():
    schedule = bake("ab2", GRID, [0, 2, 7, 12, 18])
    loop = make_loop(schedule)
    run(loop, noise(1))
    assert np.array_equal(run(loop, noise(2)), reference(schedule, noise(2)))


def test_a_failed_image_is_refused_and_does_not_poison_the_next():
    schedule = bake("ab2", GRID, [0, 2, 7, 12, 18])
    loop = make_loop(schedule)
    with pytest.raises(RenderError, match="not finite"):
        run(loop, np.full(SHAPE, np.nan, np.float32))
    assert np.array_equal(run(loop, noise()), reference(schedule, noise()))


def test_callback_sees_each_evaluation_and_changes_nothing():
    schedule = bake("ab2", GRID, [0, 2, 7])
    loop, seen = make_loop(schedule), []
    loop.initial.write(noise())
    loop.run(lambda done, budget: seen.append((done, budget)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert np.array_equal(loop.result(), reference(schedule, noise()))


def test_a_cancelled_loop_can_run_again():
    schedule = bake("ab2", GRID, [0, 2, 7, 12, 18])
    loop = make_loop(schedule)

    def cancel(done: int, _budget: int) -> None:
        if done == 2:
            raise InterruptedError

    loop.initial.write(noise(1))
    with pytest.raises(InterruptedError):
        loop.run(cancel)
    assert np.array_equal(run(loop, noise()), reference(schedule, noise()))


def test_history_is_never_truncated():
    schedule = bake("official", GRID, [0, 2, 4, 6, 8, 10, 12], [1, 2, 2, 2, 2, 2])
    assert schedule.history > 4
    with pytest.raises(ScheduleError, match="never truncated"):
        make_loop(schedule, history=4)


def two_prompts(latent: NDArray[np.float32], timestep: NDArray[np.float32]) -> NDArray[np.float32]:
    """A network whose conditional half differs from its unconditional one."""
    half = len(latent) // 2
    assert np.array_equal(latent[:half], latent[half:])
    offsets = np.repeat(np.float32([0.2, -0.1]), half)[:, None, None]
    return curved(latent, timestep) + offsets


def test_guided_loop_feeds_both_halves_and_guides_before_it_moves():
    schedule, scale = (
        bake("ab2", GRID, [0, 2, 7, 12, 18]),
        NumpyRuntime().tensor(np.float32([3, 3])),
    )
    network = Network(
        network_graph(two_prompts),
        "hidden_states",
        "timestep",
        "velocity",
        timestep_scale=1 / 1000,
        update_constants={"guidance_scale": scale},
    )
    loop = DenoisingLoop(
        NumpyRuntime(),
        {"transformer": network},
        guiding_update_graph(4),
        schedule=schedule,
        latent_shape=SHAPE,
        constants={},
    )
    for seed in (1, 2):
        loop.initial_input.write(np.concatenate([noise(seed)] * 2))
        found = run(loop, noise(seed))
        velocities: list[NDArray[np.float32]] = []
        expected = noise(seed)
        rows = schedule.table(schedule.budget)
        for timestep, row in zip(schedule.timesteps(), rows, strict=True):
            fed = np.full(2 * SHAPE[0], float(timestep) / 1000, np.float32)
            both = two_prompts(np.concatenate([expected] * 2), fed)
            conditional, unconditional = np.split(both, 2)
            velocities.insert(0, unconditional + np.float32(3) * (conditional - unconditional))
            for weight, velocity in zip(row, velocities, strict=False):
                expected = expected + weight * velocity
        # The same float32 operations in the same order, so equal to the last bit.
        assert np.array_equal(found, expected)


def test_loop_without_guidance_feeds_the_latent_itself():
    loop = make_loop(bake("euler", GRID, [0, 5]))
    assert loop.initial_input is loop.initial


def test_all_steps_evaluated_is_euler_to_the_last_bit():
    latent = noise()
    for method, spans in (("euler", None), ("official", [1] * 19), ("paper", [1] * 19)):
        schedule = bake(method, GRID, range(20), spans)
        expected = latent
        sigmas = np.asarray(GRID.sigmas, np.float32)
        for step, timestep in enumerate(np.asarray(GRID.timesteps, np.float32)):
            fed = np.full(SHAPE[0], float(timestep) / 1000, np.float32)
            expected = expected + (sigmas[step + 1] - sigmas[step]) * curved(expected, fed)
        assert np.array_equal(run(make_loop(schedule), latent), expected)


@pytest.mark.parametrize("boundary", [1001.0, 800.0, 0.0])
def test_each_row_runs_the_network_that_it_names_over_one_history(boundary: float):
    """Guided by a scale of its own; the boundary lies between rows that read each other."""
    grid = make_grid(20, shift=3.0, second_stage=SecondStage(boundary_timestep=boundary))
    schedule = bake("ab2", grid, [0, 2, 7, 12, 18])

    def negated(latent: NDArray[np.float32], timestep: NDArray[np.float32]) -> NDArray[np.float32]:
        return -two_prompts(latent, timestep)

    functions = {"transformer": two_prompts, "transformer_2": negated}
    scales = {"transformer": np.float32(3), "transformer_2": np.float32(5)}
    networks = {
        name: Network(
            network_graph(function),
            "hidden_states",
            "timestep",
            "velocity",
            timestep_scale=1 / 1000,
            update_constants={"guidance_scale": NumpyRuntime().tensor(np.full(2, scales[name]))},
        )
        for name, function in functions.items()
    }
    loop = DenoisingLoop(
        NumpyRuntime(),
        networks,
        guiding_update_graph(4),
        schedule=schedule,
        latent_shape=SHAPE,
        constants={},
    )
    loop.initial_input.write(np.concatenate([noise()] * 2))
    found, expected, velocities = run(loop, noise()), noise(), []
    rows = zip(schedule.timesteps(), schedule.table(schedule.budget), strict=True)
    for timestep, row in rows:
        name = "transformer" if timestep >= boundary else "transformer_2"
        fed = np.full(2 * SHAPE[0], float(timestep) / 1000, np.float32)
        both = functions[name](np.concatenate([expected] * 2), fed)
        conditional, unconditional = np.split(both, 2)
        velocities.insert(0, unconditional + scales[name] * (conditional - unconditional))
        for weight, velocity in zip(row, velocities, strict=False):
            expected = expected + weight * velocity
    # The same float32 operations in the same order, so equal to the last bit.
    assert np.array_equal(found, expected)
