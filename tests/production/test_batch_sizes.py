from __future__ import annotations

import numpy as np
import pytest

from meancache_trt.meancache.schedule import bake
from meancache_trt.production.batch_sizes import choose_batch, is_exact, sizes_up_to
from meancache_trt.production.tickets import Group
from meancache_trt.render import Pipeline
from meancache_trt.session import Session


@pytest.fixture
def group(pipeline: Pipeline) -> Group:
    return Group(bake("euler", pipeline.grid(4), range(4)), pipeline.resolution())


def test_sizes_double_up_to_the_limit_and_have_it():
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(8) == [1, 2, 4, 8]
    assert sizes_up_to(6) == [1, 2, 4, 6]


def test_a_size_is_chosen_of_those_that_were_tried(pipeline, group):
    chosen, trials = choose_batch(pipeline.graphs, group, limit=4)
    assert [trial.batch for trial in trials] == [1, 2, 4]
    times = {trial.batch: trial.picture_ms for trial in trials}
    assert times[chosen] <= times[1]


def test_the_stand_in_has_the_same_bits_in_any_batch(pipeline, group):
    assert is_exact(pipeline.graphs, group, 5)


def test_sizes_at_which_pictures_differ_are_not_chosen_on_the_cpu(pipeline, group, monkeypatch):
    """As with HunyuanVideo's kernels, whose sums depend on the batch from two pictures on."""
    evaluate = Session.evaluate

    def rounded(session: Session, node: int, latents: np.ndarray, *others: object) -> np.ndarray:
        velocities = evaluate(session, node, latents, *others)  # type: ignore[arg-type]
        return velocities * np.float32(1 + 1e-6 * (len(latents) > 2))

    monkeypatch.setattr(Session, "evaluate", rounded)
    assert is_exact(pipeline.graphs, group, 2)
    assert not is_exact(pipeline.graphs, group, 4)
    chosen, trials = choose_batch(pipeline.graphs, group, limit=8)
    assert [trial.batch for trial in trials] == [1, 2]
    assert chosen <= 2
