from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from meancache_trt.calibration.costs import CostRule, measure_costs
from meancache_trt.calibration.evaluation import (
    Comparison,
    Evaluation,
    Machine,
    Row,
    Setup,
    compare_batches,
    compared,
    edge_cost_map,
    joined,
    load_evaluation,
    schedule_facts,
)
from meancache_trt.calibration.metrics import latent_error, psnr, ssim
from meancache_trt.calibration.trajectories import Prompt, Trajectories
from meancache_trt.errors import InputError
from meancache_trt.meancache.files import write_json
from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import make_grid

PICTURES = 4


def batch(error: float, count: int = PICTURES) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 12, 12, 3) and latents that are off by `error` and a little more each."""
    sizes = error * (1 + 0.1 * np.arange(count)).reshape(-1, 1, 1, 1)
    pictures = np.clip(0.5 + sizes * np.ones((1, 12, 12, 3)), 0, 1).astype(np.float32)
    return pictures, 1 + sizes[:, 0, 0].astype(np.float32)


def comparison(error: float) -> Comparison:
    return compare_batches(*batch(error), *batch(0.0))


def row(method: str, budget: int, error: float, **changes: object) -> Row:
    schedule = bake("euler", make_grid(12), range(budget))
    made = Row(
        method=method,
        budget=budget,
        schedule=schedule_facts(schedule),
        ms_per_evaluation=2.0,
        own=comparison(error),
    )
    return msgspec.structs.replace(made, **changes)


SETUP = Setup(
    model="tiny",
    digest="00" * 32,
    family="flux",
    bundle_id=None,
    renderer="none",
    threads=1,
    batch=1,
    height=12,
    width=12,
    frames=None,
    frames_per_second=None,
    steps=12,
    reference_steps=None,
    guidance_scale=3.5,
    precision="float32",
    noise="philox",
)


def evaluation(*rows: Row, against: str = "euler") -> Evaluation:
    return Evaluation(
        setup=SETUP,
        machine=Machine(processor="none", cores=1, system="none", versions={}),
        prompts=tuple(Prompt(f"prompt {seed}", seed) for seed in range(PICTURES)),
        full=row("full", 12, 0.0, own=None),
        rows=compared(rows, against),
        against=against,
    )


def test_a_comparison_holds_the_metrics_of_each_picture() -> None:
    (pictures, latents), (others, other_latents) = batch(0.01), batch(0.0)
    found = compare_batches(pictures, latents, others, other_latents)
    assert found.psnr.values == tuple(psnr(pictures, others))
    assert found.ssim.values == tuple(ssim(pictures, others))
    assert found.latent_error.values == tuple(latent_error(latents, other_latents))
    assert found.psnr.summary.worst == min(found.psnr.values)
    assert found.latent_error.summary.worst == max(found.latent_error.values)


def test_batches_add_up_to_the_whole() -> None:
    (pictures, latents), (others, other_latents) = batch(0.01), batch(0.0)
    parts = [
        compare_batches(pictures[cut], latents[cut], others[cut], other_latents[cut])
        for cut in (slice(0, 3), slice(3, 4))
    ]
    assert joined(parts) == compare_batches(pictures, latents, others, other_latents)


def test_differences_are_taken_at_the_same_budget_from_the_same_pictures() -> None:
    rows = [row("euler", 6, 0.01), row("fitted", 6, 0.001), row("fitted", 8, 0.001)]
    euler, fitted, alone = compared(rows, "euler")
    assert euler.own is not None
    assert euler.own.psnr.difference is None
    assert fitted.own is not None
    assert fitted.own.psnr.difference is not None
    assert fitted.own.psnr.difference.mean == pytest.approx(20, abs=0.01)  # a tenth of the error
    assert fitted.own.latent_error.difference is not None
    assert fitted.own.latent_error.difference.mean < 0
    assert alone.own is not None
    assert alone.own.psnr.difference is None


def test_rows_are_sorted_by_budget_within_their_method() -> None:
    rows = [row("b", 8, 0.1), row("a", 6, 0.1), row("b", 6, 0.1)]
    found = [(each.method, each.budget) for each in compared(rows, "a")]
    assert found == [("b", 6), ("b", 8), ("a", 6)]


def test_differences_from_what_was_not_evaluated_are_refused() -> None:
    with pytest.raises(InputError, match="one of the evaluated methods, euler; found 'fitted'"):
        compared([row("euler", 6, 0.1)], "fitted")


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    made = evaluation(row("euler", 6, 0.01), row("fitted", 6, 0.001))
    write_json(tmp_path / "evaluation.json", made)
    assert load_evaluation(tmp_path / "evaluation.json") == made
    assert made.methods == ["euler", "fitted"]
    assert made.budgets == [6]
    assert made.references == ["own"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "meancache-trt/evaluation/2"}, "evaluation/2"),
        ({"unknown": 1}, "unknown"),
        ({"prompts": []}, "expected 0 values of euler"),
        ({"rows": []}, "has rows"),
    ],
)
def test_another_file_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    content = msgspec.to_builtins(evaluation(row("euler", 6, 0.01)))
    write_json(tmp_path / "evaluation.json", {**content, **change})
    with pytest.raises(InputError, match=message) as found:
        load_evaluation(tmp_path / "evaluation.json")
    assert "evaluation.json" in str(found.value)


def test_the_same_method_and_budget_twice_is_refused() -> None:
    with pytest.raises(InputError, match="each method and budget once"):
        evaluation(row("euler", 6, 0.01), row("euler", 6, 0.02))


def test_the_edge_cost_map_is_the_mean_over_samples(trajectories: Trajectories) -> None:
    found = edge_cost_map(trajectories)
    rule = CostRule("euler", "displacement", "l2", max_span=1)
    costs = measure_costs(trajectories, trajectories.grid.array(), rule)
    expected = costs.mean[..., 0]
    mean = np.array([[np.inf if cost is None else cost for cost in line] for line in found.mean])
    np.testing.assert_allclose(mean, expected, rtol=1e-3)  # four digits are kept
    assert found.samples == len(trajectories)
    assert found.median_variation is not None
    assert 0 < found.median_variation < 10
