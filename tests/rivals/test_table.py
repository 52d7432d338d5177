"""Rows, what they are compared with, and how they are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.hooks import FirstBlockCacheConfig
from scripts.rivals import block_caches, hooks
from scripts.rivals.measure import LeftoverError, Reference, measure
from scripts.rivals.rival import Rival
from scripts.rivals.rows import Against, Row, against, rows_of
from scripts.rivals.solvers import flow_solver
from scripts.rivals.subject import STEPS, Subject
from scripts.rivals.table import closest_table, remarks, rows_table

from meancache_trt.calibration.metrics import PsnrSummary
from meancache_trt.meancache.schedule import FITTED
from tests.rivals.subjects import subject


@pytest.fixture(scope="module")
def flux() -> Subject:
    return subject("flux")


def row(method: str, work: float, ahead: float, budget: int = 8) -> Row:
    summary = PsnrSummary(mean=40.0, p5=35.0, worst=30.0)
    met = Against(budget=budget, psnr_db=summary, ahead_db=ahead, ahead_error_db=0.25)
    return Row(
        method=method,
        setting=f"at {work}",
        evaluations=work,
        psnr_db=summary,
        against_fitted=met,
    )


def rival(method: str, applied: Callable[[Subject], AbstractContextManager[int]]) -> Rival:
    return Rival(method, "only", applied)


@contextmanager
def steps(count: int, _subject: Subject) -> Iterator[int]:
    yield count


@contextmanager
def failing(_subject: Subject) -> Iterator[int]:
    raise ValueError("no such blocks")
    yield


@contextmanager
def leaving(subject: Subject) -> Iterator[int]:
    subject.pipeline.scheduler = flow_solver(UniPCMultistepScheduler, 2, subject.pipeline.scheduler)
    yield 2


def test_fitted_never_takes_more_work_than_what_it_stands_beside() -> None:
    values = np.array([30.0, 32.0])
    fitted = {5: np.array([31.0, 35.0]), 8: np.array([41.0, 41.0])}
    met = against(values, 7.9, fitted)
    assert met is not None
    assert (met.budget, met.ahead_db, met.psnr_db.worst) == (5, 2.0, 31.0)
    assert met.ahead_error_db == pytest.approx(1.0)  # gaps 1 and 3: √2 / √2
    exact = against(values, 8.0, fitted)
    assert exact is not None
    assert exact.budget == 8
    assert against(values, 4.9, fitted) is None


def test_rivals_that_cannot_run_are_rows_with_their_error(flux: Subject) -> None:
    rivals = [
        rival("broken", failing),
        rival("fewer steps", partial(steps, 5)),
        rival(FITTED, partial(steps, 4)),
        rival("idle", partial(steps, STEPS)),
    ]
    runs = [flux.run(prompt) for prompt in flux.prompts]
    measured = measure(flux, rivals, note=lambda _: None)
    broken, fewer, fitted, idle = rows_of(measured, Reference(runs, runs))
    assert broken.error == "ValueError: no such blocks"
    assert fewer.evaluations == pytest.approx(5)
    assert fewer.against_fitted is not None
    assert fewer.against_fitted.budget == 4
    assert fitted.against_fitted is None
    assert idle.is_idle
    assert idle.psnr_db is not None
    assert idle.psnr_db.worst == 100
    assert 0 < (fewer.time or 0) < 1


def test_a_rival_that_changes_the_pipeline_for_good_stops_the_benchmark() -> None:
    with pytest.raises(LeftoverError, match="careless"):
        measure(subject("flux"), [rival("careless", leaving)], note=lambda _: None)


def test_diffusers_caches_run_after_cache_dit(flux: Subject) -> None:
    pytest.importorskip("cache_dit", reason="needs the `rivals` extra")
    mask = block_caches.even_mask(8)
    config = partial(FirstBlockCacheConfig, threshold=1e9)
    rivals = [
        rival("cache-dit", partial(block_caches._static, 1, mask)),
        rival("hook", partial(hooks._cached, config)),
    ]
    assert [one.error for one in measure(flux, rivals, note=lambda _: None)] == [None, None]


# diffusers 0.42.1 converts tensors in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("solver", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_multistep_solvers_run_on_the_stock_grid(flux: Subject, solver: type) -> None:
    stock = flux.pipeline.scheduler
    flux.run(flux.prompts[0], 8)
    wanted = stock.sigmas.numpy()
    scheduler = flow_solver(solver, 2, stock)
    with flux.scheduler(scheduler):
        flux.run(flux.prompts[0], 8)
    # Both end their unshifted grid at 1/1000 and not at 0.
    np.testing.assert_allclose(scheduler.sigmas.numpy(), wanted, atol=2e-3)


def test_what_is_in_no_table_is_said_once() -> None:
    rows = [
        Row(method="a", setting="1", error="ValueError: no"),
        Row(method="a", setting="2", error="ValueError: no"),
        Row(method="b", setting="1", error="ValueError: no"),
        row("c", 40, 1),
        row("c", 31, 1),
        row("d", 9, 1),
        row("d", 31, 1),
    ]
    assert remarks(rows, largest=25) == [
        "c: 31.0 evaluations or more.",
        "a, 1; 2: ValueError: no",
        "b, 1: ValueError: no",
    ]
    assert "no" not in rows_table(rows, is_markdown=False).replace("nothing", "")


def test_rows_stand_by_work_and_say_when_nothing_was_skipped() -> None:
    table = rows_table([row("a", 50.0, 1), row("a", 9.0, 2)], is_markdown=True)
    head, rule, first, second = table.splitlines()
    assert head.count("|") == rule.count("|") == first.count("|")
    assert "| 9.0 |" in first
    assert "B = 8" in first
    assert "+2.0 ± 0.2" in first
    assert "skips nothing" in second


def test_the_closest_setting_is_the_one_where_fitted_is_least_ahead() -> None:
    rows = [row("a", 9, 3), row("a", 12, -1), row("a", 40, -5), row("b", 9, 2)]
    table = closest_table(rows, largest=25, is_markdown=False)
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        ["a", "at", "12"],
        ["b", "at", "9"],
    ]
