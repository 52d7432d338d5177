"""Tables judged by pictures, and how alike samples are."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.calibration.conftest import FieldSampler, FormulaField

from meancache_trt.calibration.costs import CostRule, measure_costs
from meancache_trt.calibration.fidelity import judging, mean_error
from meancache_trt.calibration.metrics import bootstrap_interval, psnr, ssim
from meancache_trt.calibration.sequential_fit import FitOptions
from meancache_trt.calibration.stability import edge_stability
from meancache_trt.calibration.trajectories import (
    Array,
    Prompt,
    Settings,
    Trajectories,
    record,
)
from meancache_trt.calibration.velocity_field import batch_of
from meancache_trt.meancache.folding import interval_widths
from meancache_trt.meancache.sigmas import make_grid

NODES = (0, 2, 5, 6, 9)


def euler_ends(samples: Trajectories, network: FormulaField) -> Array:
    widths = interval_widths(samples.grid.array(), NODES)
    ends = []
    for sample in samples:
        latent = sample.initial[None]
        for node, width in zip(NODES, widths, strict=True):
            latent = (latent + width * network([sample.prompt], latent, node)).astype(np.float32)
        ends.append(latent[0])
    return np.stack(ends)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_outcome_compares_decoded_pictures(samples: Trajectories, batch: int) -> None:
    network = FormulaField(samples.grid, batch)
    with judging(samples, network) as judge:
        found = judge.euler(NODES)
    wide = FormulaField(samples.grid, 6)
    pictures = wide.pictures(euler_ends(samples, wide))
    references = wide.pictures(np.stack([sample.final for sample in samples]))
    np.testing.assert_allclose(found.psnr, psnr(pictures, references), atol=1e-3)  # float32 sums
    np.testing.assert_allclose(found.ssim, ssim(pictures, references), atol=1e-5)
    assert found.evaluations == 6 * (len(NODES) - 1)


def test_every_step_is_the_recording_and_shows_the_noise_floor(
    samples: Trajectories, network: FormulaField
) -> None:
    with judging(samples, network) as judge:
        assert judge.noise_floor() > 90  # float32 sums in another order
        assert network.evaluations == 11  # of a single sample, whose first velocity is recorded


def test_a_score_counts_the_bad_pictures(samples: Trajectories, network: FormulaField) -> None:
    with judging(samples, network) as judge:
        found = judge.fit(NODES, FitOptions())
    assert found.score == pytest.approx(found.psnr.mean() + np.percentile(found.psnr, 5))
    summary = found.fidelity()
    assert summary.psnr.interval is not None
    low, high = summary.psnr.interval
    assert low < summary.psnr.mean < high
    assert summary.latent_error == mean_error(found.errors)


def test_an_interval_holds_the_mean_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        low, high = bootstrap_interval(30 + 4 * rng.standard_normal(32))
        held += low < 30 < high
    assert held / 200 == pytest.approx(0.95, abs=0.05)  # 3 standard errors, and 32 are few


def test_stability_compares_each_sample_with_the_others(samples: Trajectories) -> None:
    stats = pytest.importorskip("scipy.stats")
    rule, sigmas = CostRule("euler", max_span=1), samples.grid.array()
    each = np.stack([measure_costs([t], sigmas, rule).mean[..., 0] for t in samples])
    is_edge = np.triu(np.ones(each.shape[1:], bool), k=2)
    edges = each[:, is_edge]
    correlations = [
        stats.spearmanr(own, np.delete(edges, index, axis=0).mean(axis=0)).statistic
        for index, own in enumerate(edges)
    ]
    found = edge_stability(samples)
    assert found is not None
    assert found.variation == pytest.approx(np.median(edges.std(0, ddof=1) / edges.mean(0)))
    assert found.correlation == pytest.approx(np.mean(correlations))
    assert found.worst_correlation == pytest.approx(np.min(correlations))


def test_two_steps_have_nothing_to_be_compared(tmp_path: Path, settings: Settings) -> None:
    grid = make_grid(2, shift=3.0)
    short = msgspec.structs.replace(settings, grid=grid)
    prompts = [Prompt("a ring", seed) for seed in range(3)]
    recorded = record(tmp_path / "short", short, FieldSampler(grid), prompts)
    assert edge_stability(recorded) is None


def test_a_single_sample_has_nothing_to_be_compared_with(samples: Trajectories) -> None:
    alone = Trajectories(samples.directory, samples.settings, samples.samples[:1])
    assert edge_stability(alone) is None


@pytest.mark.parametrize(
    ("latent_size", "samples", "batch"),
    [(2048, 8, 8), (2048, 512, 16), (2**18, 16, 4), (2**23, 16, 1)],
)
def test_a_batch_holds_no_more_for_more_samples(latent_size: int, samples: int, batch: int) -> None:
    assert batch_of(latent_size, samples) == batch
