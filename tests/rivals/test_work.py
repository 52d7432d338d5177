"""Work is what is executed: against torch's own counter, and against what each cache must skip."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from scripts.rivals import block_caches, hooks, ours
from scripts.rivals.measure import Blocks, blocks, evaluations
from scripts.rivals.rival import Rival
from scripts.rivals.subject import STEPS, Subject, own_transformer
from scripts.rivals.work import FlopCounter
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import make_grid
from tests.rivals.subjects import CALLS, subject

RELATIVE = 1e-12
"""Counts are whole numbers; only their quotients round."""


@pytest.fixture(scope="module")
def flux() -> Subject:
    return subject("flux")


def cpu_attention_flops(
    query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """torch's counter knows the attention kernels of GPUs only."""
    return int(2 * np.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def work_of(subject: Subject, rival: Rival) -> float:
    whole = subject.run(subject.prompts[0])
    with own_transformer(subject), rival.applied(subject) as steps:
        run = subject.run(subject.prompts[0], steps)
    return evaluations([run], [whole])[0]


def partial_work(kinds: list[Blocks], first_blocks: int, full: int) -> float:
    """Evaluations where `full` steps run everything, and the others all but the later blocks."""
    shares = [share for kind in kinds for share in kind.shares]
    return full + (STEPS - full) * (1 - sum(shares[first_blocks:]))


def test_matrix_products_are_counted_in_closed_form() -> None:
    with FlopCounter() as counter:
        functional.linear(torch.ones(3, 5, 7), torch.ones(11, 7))
        assert counter.flops == 2 * 3 * 5 * 7 * 11
        functional.scaled_dot_product_attention(*(torch.ones(2, 4, n, 8) for n in (6, 9, 9)))
        assert counter.flops == 2 * 3 * 5 * 7 * 11 + 2 * (2 * 2 * 4 * 6 * 9 * 8)
        torch.ones(3) * 2 + torch.ones(3)
    assert counter.flops == 2 * 3 * 5 * 7 * 11 + 2 * (2 * 2 * 4 * 6 * 9 * 8)


@pytest.mark.parametrize("family", CALLS)
def test_a_transformer_is_counted_as_torch_counts_it(family: str) -> None:
    made = subject(family)
    run = made.run(made.prompts[0], steps=2)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: cpu_attention_flops}) as oracle:
        made.run(made.prompts[0], steps=2, is_counting=False)
    name = type(made.pipeline.transformer).__name__
    wanted = sum(oracle.get_flop_counts()[name].values())
    assert run.flops == wanted > 0
    assert run.calls == (4 if family == "qwen_image" else 2)


def test_every_step_of_the_network_is_one_evaluation(flux: Subject) -> None:
    whole = flux.run(flux.prompts[0])
    part = flux.run(flux.prompts[0], steps=7)
    assert evaluations([whole, part], [whole, whole]) == pytest.approx([STEPS, 7], rel=RELATIVE)


def test_a_schedule_takes_as_many_evaluations_as_it_has_nodes(flux: Subject) -> None:
    grid = make_grid(STEPS, shift=flux.pipeline.scheduler.config.shift)
    schedule = bake("euler", grid, (0, 2, 9, 30))
    (rival,) = ours.rivals({"euler": [schedule]})
    assert work_of(flux, rival) == pytest.approx(4, rel=RELATIVE)


def test_a_cache_of_the_first_block_pays_for_it_at_every_step(flux: Subject) -> None:
    config = partial(FirstBlockCacheConfig, threshold=1e9)
    wanted = partial_work(blocks(flux), first_blocks=1, full=1)
    assert work_of(flux, Rival("", "", partial(hooks._cached, config))) == pytest.approx(
        wanted, rel=RELATIVE
    )
    assert wanted > 10  # of a network with three blocks


def test_a_cache_that_never_meets_its_threshold_saves_nothing(flux: Subject) -> None:
    config = partial(FirstBlockCacheConfig, threshold=0.0)
    found = work_of(flux, Rival("", "", partial(hooks._cached, config)))
    assert found == pytest.approx(STEPS, rel=RELATIVE)


def test_a_forecast_of_the_output_runs_no_block(flux: Subject) -> None:
    config = partial(
        TaylorSeerCacheConfig, cache_interval=10, disable_cache_before_step=3, use_lite_mode=True
    )
    # Steps 0, 1 and 2, then 4, 14, 24, 34 and 44; the output's projection is forecast too.
    least, most = 8, partial_work(blocks(flux), first_blocks=0, full=8)
    assert least < work_of(flux, Rival("", "", partial(hooks._cached, config))) < most


@pytest.mark.parametrize("order", block_caches.ORDERS)
def test_a_static_mask_pays_for_its_steps_and_for_the_first_block(
    flux: Subject, order: int
) -> None:
    pytest.importorskip("cache_dit", reason="needs the `rivals` extra")
    mask = block_caches.even_mask(8)
    found = work_of(flux, Rival("", "", partial(block_caches._static, order, mask)))
    wanted = partial_work(blocks(flux), first_blocks=1, full=8)
    assert sum(mask) == 8
    assert found == pytest.approx(wanted, rel=RELATIVE)


def test_magcache_gets_a_ratio_for_every_step(flux: Subject) -> None:
    ratios = hooks.calibrated_ratios(flux, flux.prompts)
    assert len(ratios) == STEPS
    assert ratios[0] == 1.0
    assert np.isfinite(ratios).all()
