"""Rows fitted along their own trajectories, on a field that is known in closed form."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tests.calibration.conftest import FieldSampler, FormulaField

from meancache_trt.calibration.sequential_fit import FitOptions, fit_row, fit_rows, follow_rows
from meancache_trt.calibration.trajectories import (
    Array,
    Prompt,
    Settings,
    Trajectories,
    record,
)
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.folding import Rows, interval_widths
from meancache_trt.meancache.sigmas import SigmaGrid

NODES = (0, 2, 5, 6, 9)


def table(rows: Rows) -> NDArray[np.float64]:
    return np.array([[*row, *[0.0] * (len(rows) - len(row))] for row in rows])


@pytest.mark.parametrize("is_consistent", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_row_without_a_ridge_is_that_of_least_squares(count: int, is_consistent: bool) -> None:
    rng = np.random.default_rng(1)
    velocities, target = rng.standard_normal((count, 20)), rng.standard_normal(20)
    stacked = np.vstack([velocities, target])
    found = fit_row(stacked @ stacked.T, -0.3, ridge=0.0, is_consistent=is_consistent)
    if is_consistent:  # the last weight follows from the sum
        differences = velocities[:-1] - velocities[-1]
        solved, *_ = np.linalg.lstsq(differences.T, target + 0.3 * velocities[-1], rcond=None)
        wanted = np.append(solved, -0.3 - solved.sum())
    else:
        wanted, *_ = np.linalg.lstsq(velocities.T, target, rcond=None)
    np.testing.assert_allclose(found, wanted, atol=1e-12)  # normal equations, well conditioned


def test_a_row_of_equal_velocities_is_finite_without_a_ridge() -> None:
    found = fit_row(np.ones((4, 4)), -0.3, ridge=0.0)
    assert found.sum() == pytest.approx(1.0)


def test_a_large_ridge_is_plain_reuse(samples: Trajectories, network: FormulaField) -> None:
    options = FitOptions(ridge=1e12, is_consistent=False)
    rows = table(fit_rows(samples, network, NODES, options).rows)
    widths = interval_widths(samples.grid.array(), NODES)
    np.testing.assert_allclose(rows, _first(widths), atol=1e-9)


def _first(widths: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([widths[:, None], np.zeros((len(widths), len(widths) - 1))], axis=1)


def in_memory(
    samples: Trajectories, network: FormulaField, nodes: Sequence[int], options: FitOptions
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
    """The same fit as a loop over arrays that hold every sample: its rows and errors."""
    recorded = list(samples)
    v = np.stack([t.velocities for t in recorded]).astype(float)
    x = np.stack([t.initial for t in recorded])
    norms = np.linalg.norm(np.stack([t.final for t in recorded]).astype(float), axis=1)
    folds = min(options.folds, len(recorded))
    steps, fold = np.diff(samples.grid.array()), np.arange(len(recorded)) % folds
    ends, gap, past, rows = [*nodes[1:], samples.grid.steps], np.zeros(x.shape), [], []
    for n, node in enumerate(nodes):
        velocity = v[:, 0]
        if n:
            one_by_one = [
                network([t.prompt], latent[None], node)
                for t, latent in zip(recorded, x, strict=True)
            ]
            velocity = np.concatenate(one_by_one).astype(float)
        past = [velocity, *past][: options.history]
        gap = gap + np.einsum("k,skn->sn", steps[node : ends[n]], v[:, node : ends[n]])
        stacked = np.stack([*past, gap], axis=1) / norms[:, None, None]
        grams = stacked @ stacked.transpose(0, 2, 1)

        def solved(kept: NDArray[np.bool_], grams: Array = grams, n: int = n) -> Array:
            width = interval_widths(samples.grid.array(), nodes)[n]
            return fit_row(
                grams[kept].sum(0),
                width,
                ridge=options.ridge,
                is_consistent=options.is_consistent,
            )

        everyone = np.ones(len(fold), bool)
        rows.append(solved(everyone))
        used = [solved(fold != f if folds > 1 else everyone) for f in fold]
        moved = np.stack([np.tensordot(w, [p[s] for p in past], 1) for s, w in enumerate(used)])
        x, gap = (x + moved).astype(np.float32), gap - moved
    return rows, np.linalg.norm(gap, axis=1) / norms


@pytest.mark.parametrize(
    "options",
    [FitOptions(), FitOptions(folds=1, history=2), FitOptions(folds=3, is_consistent=False)],
)
def test_streaming_finds_what_a_loop_in_memory_does(
    samples: Trajectories, network: FormulaField, options: FitOptions
) -> None:
    found = fit_rows(samples, network, NODES, options)
    rows, errors = in_memory(samples, network, NODES, options)
    # float32 states; near-dependent velocities amplify their rounding in the weights
    wanted = [np.append(row, np.zeros(len(NODES) - len(row))) for row in rows]
    np.testing.assert_allclose(table(found.rows), wanted, atol=1e-3)
    np.testing.assert_allclose(found.errors, errors, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4, 6, 50])
def test_rows_do_not_depend_on_the_batch(
    samples: Trajectories, grid: SigmaGrid, batch: int
) -> None:
    two = fit_rows(samples, FormulaField(grid), NODES)
    found = fit_rows(samples, FormulaField(grid, batch), NODES)
    assert found.rows == two.rows
    assert (found.errors == two.errors).all()


def test_memory_does_not_grow_with_the_samples(
    tmp_path: Path, settings: Settings, grid: SigmaGrid
) -> None:
    class Constant:
        batch = 2

        def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:  # noqa: ARG002
            return np.ones_like(latents)

    def sample(prompt: Prompt, on_step: Callable[[int, Array], None]) -> tuple[Array, Array]:
        ones = np.ones(20_000, np.float32)
        for step in range(grid.steps):
            on_step(step, ones)
        return ones * 5, ones * 4

    (only,) = record(tmp_path / "one", settings, sample, [Prompt("ones")]).samples

    def peak(count: int) -> int:
        many = Trajectories(tmp_path / "one", settings, (only,) * count)
        tracemalloc.start()
        fit_rows(many, Constant(), NODES)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(4)  # what is imported at the first use
    assert peak(64) < 1.2 * peak(4)


def test_every_sample_is_evaluated_once_at_every_node_but_the_first(
    samples: Trajectories, network: FormulaField
) -> None:
    found = fit_rows(samples, network, NODES)
    assert found.evaluations == network.evaluations == 6 * (len(NODES) - 1)


def run_rows(samples: Trajectories, network: FormulaField, rows: Rows) -> NDArray[np.float64]:
    """Relative final errors of a table."""
    errors = []
    for t in samples:
        x, past = t.initial.astype(float), []
        for node, row in zip(NODES, rows, strict=True):
            past.insert(0, network([t.prompt], x[None].astype(np.float32), node)[0])
            x = x + sum(w * v for w, v in zip(row, past, strict=False))
        errors.append(np.linalg.norm(x - t.final) / np.linalg.norm(t.final))
    return np.array(errors)


@pytest.mark.parametrize("is_consistent", [False, True])
def test_errors_are_those_of_the_table_and_below_eulers(
    samples: Trajectories, network: FormulaField, is_consistent: bool
) -> None:
    found = fit_rows(samples, network, NODES, FitOptions(folds=1, is_consistent=is_consistent))
    errors = run_rows(samples, network, found.rows)
    # the recording's float32 latents against the sum of its float32 velocities
    np.testing.assert_allclose(found.errors, errors, atol=1e-5)
    euler = tuple((w,) for w in interval_widths(samples.grid.array(), NODES).tolist())
    assert np.square(errors).sum() < np.square(run_rows(samples, network, euler)).sum()


def test_a_sample_moves_by_rows_that_never_saw_it(
    samples: Trajectories, network: FormulaField
) -> None:
    """Leaving one out, its first row is that of a fit on the others."""
    held_out = fit_rows(samples, network, (0,), FitOptions(folds=6, is_consistent=False))
    for index, sample in enumerate(samples):
        others = Trajectories(
            samples.directory,
            samples.settings,
            tuple(s for i, s in enumerate(samples.samples) if i != index),
        )
        ((weight,),) = fit_rows(
            others, network, (0,), FitOptions(folds=1, is_consistent=False)
        ).rows
        end = sample.initial + weight * sample.velocities[0]
        error = np.linalg.norm(end - sample.final) / np.linalg.norm(sample.final)
        assert held_out.errors[index] == pytest.approx(error, rel=1e-5)  # float32 latents


@pytest.mark.parametrize("is_consistent", [False, True])
def test_a_velocity_linear_in_sigma_is_integrated_exactly_by_two_terms(
    tmp_path: Path, settings: Settings, grid: SigmaGrid, is_consistent: bool
) -> None:
    def sample(prompt: Prompt, on_step: Callable[[int, Array], None]) -> tuple[Array, Array]:
        latent = initial = _noise(prompt)
        for step in range(grid.steps):
            velocity = linear([prompt], latent[None], step)[0]
            on_step(step, velocity)
            latent = latent + np.float32(np.diff(grid.array())[step]) * velocity
        return initial, latent

    class Linear:
        batch = 3

        def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:  # noqa: ARG002
            sigma = grid.array()[step]
            made = [_noise(p) * sigma + np.cos(7 * _noise(p)) for p in prompts]
            return np.stack(made).astype(np.float32)

    linear = Linear()
    prompts = [Prompt("line", seed) for seed in range(4)]
    lines = record(tmp_path / "lines", settings, sample, prompts)
    options = FitOptions(history=2, ridge=1e-12, is_consistent=is_consistent, folds=1)
    errors = fit_rows(lines, linear, (0, 3, 7), options).errors
    assert errors.max() < 1e-5  # float32 velocities and states
    assert fit_rows(lines, linear, (0,), options).errors.max() > 1e-2


def _noise(prompt: Prompt) -> Array:
    return np.random.default_rng(prompt.seed).standard_normal(24).astype(np.float32)


def test_a_velocity_that_is_not_finite_is_an_error(
    samples: Trajectories, network: FormulaField
) -> None:
    class Broken(FormulaField):
        def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:
            velocities = super().__call__(prompts, latents, step)
            velocities[step == 5 :, 3] = np.nan
            return velocities

    with pytest.raises(CalibrationError, match=r"at step \d for 'a ring'.*not finite"):
        fit_rows(samples, Broken(samples.grid), NODES)


def test_a_trajectory_that_leaves_its_recording_is_an_error(samples: Trajectories) -> None:
    class Wild(FormulaField):
        """Ten thousand times as fast for one sample, whose rows are fitted on the others."""

        def __call__(self, prompts: Sequence[Prompt], latents: Array, step: int) -> Array:
            factors = [1e4 if prompt.seed == 2 else 1.0 for prompt in prompts]
            return super().__call__(prompts, latents, step) * np.float32(factors)[:, None]

    with pytest.raises(CalibrationError, match=r"seed 2\) is .* away from its recording after"):
        fit_rows(samples, Wild(samples.grid), NODES)


def test_there_are_no_more_folds_than_samples(samples: Trajectories, network: FormulaField) -> None:
    one_by_one = fit_rows(samples, network, NODES, FitOptions(folds=6))
    many = fit_rows(samples, network, NODES, FitOptions(folds=99))
    assert many.rows == one_by_one.rows
    assert (many.errors == one_by_one.errors).all()


def test_a_single_sample_cannot_be_held_out(samples: Trajectories, network: FormulaField) -> None:
    alone = Trajectories(samples.directory, samples.settings, samples.samples[:1])
    with pytest.raises(CalibrationError, match="needs at least 2, found 1; record more"):
        fit_rows(alone, network, NODES)
    fit_rows(alone, network, NODES, FitOptions(folds=1))


def test_a_table_that_is_given_is_followed(samples: Trajectories, network: FormulaField) -> None:
    rows = fit_rows(samples, network, NODES, FitOptions(folds=1)).rows
    ends: dict[int, Array] = {}

    def keep(chunk: Sequence[int], latents: Array) -> None:
        ends.update(zip(chunk, latents, strict=True))

    found = follow_rows(samples, network, NODES, rows, keep)
    assert found.rows == rows
    # the recording's float32 latents against the sum of its float32 velocities
    np.testing.assert_allclose(found.errors, run_rows(samples, network, rows), atol=1e-5)
    for index, sample in enumerate(samples):
        error = np.linalg.norm(ends[index] - sample.final) / np.linalg.norm(sample.final)
        assert found.errors[index] == pytest.approx(error, abs=1e-5)


def test_a_recording_over_another_grid_is_an_error(
    samples: Trajectories, network: FormulaField
) -> None:
    first = next(iter(samples))
    tensors = {
        "velocities": first.velocities[:7],
        "initial": first.initial,
        "final": first.final,
    }
    save_file(tensors, samples.directory / samples.samples[3].file)
    with pytest.raises(CalibrationError, match="expected 12 velocities, found 7"):
        fit_rows(samples, network, NODES)


def test_a_picture_of_nothing_is_an_error(
    tmp_path: Path, settings: Settings, grid: SigmaGrid, network: FormulaField
) -> None:
    def sample(prompt: Prompt, on_step: Callable[[int, Array], None]) -> tuple[Array, Array]:
        zeros = np.zeros(24, np.float32)
        for step in range(grid.steps):
            on_step(step, zeros)
        return zeros, zeros

    empty = record(tmp_path / "empty", settings, sample, [Prompt("nothing", s) for s in range(4)])
    with pytest.raises(CalibrationError, match="final latent of 'nothing' is zero"):
        fit_rows(empty, network, NODES)


@pytest.mark.parametrize("change", [{"history": 0}, {"history": 9}, {"ridge": -1.0}, {"folds": 0}])
def test_options_out_of_range_are_errors(change: dict[str, float]) -> None:
    with pytest.raises(CalibrationError, match="a fit has a history of 1 to 8"):
        FitOptions(**change)  # type: ignore[arg-type]


def test_the_recording_is_not_changed(samples: Trajectories, network: FormulaField) -> None:
    before = [t.velocities.copy() for t in samples]
    fit_rows(samples, network, NODES)
    assert all((a == t.velocities).all() for a, t in zip(before, samples, strict=True))


def test_the_sampler_and_the_field_agree(samples: Trajectories, sampler: FieldSampler) -> None:
    first = next(iter(samples))
    found = FormulaField(samples.grid)([first.prompt], first.initial[None], 0)
    np.testing.assert_allclose(found[0], first.velocities[0], rtol=1e-6)  # float32 latents
