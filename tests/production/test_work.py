"""Batches through the network: each picture as if it were alone, whatever its batch mates do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from meancache_trt.errors import InputError, RenderError
from meancache_trt.production.jobs import Job, Limits
from meancache_trt.production.tickets import Checker, Defaults, Settings, Ticket
from meancache_trt.production.work import (
    Cancelled,
    Decode,
    Denoise,
    Encode,
    Encoded,
    Failure,
    Latents,
    Pictures,
    reason,
)
from meancache_trt.render import Pipeline

PROMPTS = ("a small red circle", "two blue squares", "a green star at the top")


@pytest.fixture
def tickets(pipeline: Pipeline) -> list[Ticket]:
    checker = Checker(pipeline, Settings(), Defaults(schedule="b6"), Limits())
    jobs = [Job(id=str(n), prompt=prompt, seed=n) for n, prompt in enumerate(PROMPTS)]
    return [checker.check(index, job) for index, job in enumerate(jobs)]


def encoded(pipeline: Pipeline, tickets: Sequence[Ticket], batch: int = 8) -> list[Encoded]:
    made = Encode(pipeline.graphs, pipeline.encoder_on(pipeline.graphs))(tickets, batch)
    assert all(isinstance(item, Encoded) for item in made)
    return [item for item in made if isinstance(item, Encoded)]


def denoised(pipeline: Pipeline, batch: Encoded) -> list[Latents | Failure]:
    return Denoise(pipeline.graphs, Settings())(batch)


def latents_by_job(made: Sequence[Latents | Failure]) -> dict[str, np.ndarray]:
    return {
        ticket.job.id: latent
        for item in made
        if isinstance(item, Latents)
        for ticket, latent in zip(item.tickets, item.latents, strict=True)
    }


@pytest.fixture
def alone(pipeline: Pipeline, tickets: list[Ticket]) -> dict[str, np.ndarray]:
    """What the pipeline itself makes of each job."""
    return {
        ticket.job.id: pipeline.render([ticket.job.prompt], seed=ticket.seed, schedule="b6")[
            0
        ].latent
        for ticket in tickets
    }


def assert_equal(made: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert made.keys() == expected.keys()
    for job, latent in made.items():
        np.testing.assert_array_equal(latent, expected[job])


def with_nan(batch: Encoded, index: int) -> Encoded:
    tensors = {name: np.full_like(tensor, np.nan) for name, tensor in
               batch.conditionings[index].items()}  # fmt: skip
    before, after = batch.conditionings[:index], batch.conditionings[index + 1 :]
    return replace(batch, conditionings=(*before, tensors, *after))


def test_a_batch_has_the_bits_of_its_pictures_alone(
    pipeline: Pipeline, tickets: list[Ticket], alone: dict[str, np.ndarray]
) -> None:
    (batch,) = encoded(pipeline, tickets)
    made = denoised(pipeline, batch)
    assert_equal(latents_by_job(made), alone)
    (whole,) = made
    assert isinstance(whole, Latents)
    assert whole.batch == 3
    assert whole.loop_ms > 0


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_picture_that_is_not_finite_fails_alone_and_its_mates_keep_their_bits(
    bad: int, pipeline: Pipeline, tickets: list[Ticket], alone: dict[str, np.ndarray]
) -> None:
    (batch,) = encoded(pipeline, tickets)
    work = Denoise(pipeline.graphs, Settings())
    made = work(with_nan(batch, bad))
    (failure,) = [item for item in made if isinstance(item, Failure)]
    assert failure.ticket is tickets[bad]
    assert isinstance(failure.error, RenderError)
    assert "not finite" in reason(failure.error)
    expected = {job: latent for job, latent in alone.items() if job != str(bad)}
    assert_equal(latents_by_job(made), expected)
    assert_equal(latents_by_job(work(batch)), alone)  # nothing of it stays in the session


def test_a_batch_that_a_backend_refuses_is_tried_picture_by_picture(
    pipeline: Pipeline, tickets: list[Ticket], alone: dict[str, np.ndarray]
) -> None:
    refusals = [MemoryError("no room for three")]

    def refuse_once(done: int, budget: int) -> None:
        if refusals:
            raise refusals.pop()

    (batch,) = encoded(pipeline, tickets)
    made = denoised(pipeline, replace(batch, on_evaluation=refuse_once))
    assert [len(item.tickets) for item in made if isinstance(item, Latents)] == [1, 1, 1]
    assert_equal(latents_by_job(made), alone)


def test_a_backend_that_refuses_everything_fails_each_job_with_its_words(
    pipeline: Pipeline, tickets: list[Ticket], alone: dict[str, np.ndarray]
) -> None:
    def refuse(done: int, budget: int) -> None:
        raise RuntimeError("device lost")

    (batch,) = encoded(pipeline, tickets)
    work = Denoise(pipeline.graphs, Settings())
    made = work(replace(batch, on_evaluation=refuse))
    failures = [item for item in made if isinstance(item, Failure)]
    assert [failure.ticket for failure in failures] == tickets
    assert {reason(failure.error) for failure in failures} == {"RuntimeError: device lost"}
    assert_equal(latents_by_job(work(batch)), alone)


def test_a_cancelled_batch_is_not_tried_again(pipeline: Pipeline, tickets: list[Ticket]) -> None:
    seen: list[tuple[int, int]] = []

    def cancel(done: int, budget: int) -> None:
        seen.append((done, budget))
        raise Cancelled("enough")

    (batch,) = encoded(pipeline, tickets)
    made = denoised(pipeline, replace(batch, on_evaluation=cancel))
    assert seen == [(1, 6)]
    assert all(isinstance(item, Failure) for item in made)
    assert len(made) == 3


def test_a_prompt_that_cannot_be_encoded_fails_alone(
    pipeline: Pipeline, tickets: list[Ticket]
) -> None:
    broken = replace(tickets[1], job=msgspec.structs.replace(tickets[1].job, prompt="a \ud800"))
    work = Encode(pipeline.graphs, pipeline.encoder_on(pipeline.graphs))
    made = work([tickets[0], broken, tickets[2]], 8)
    failures = [item for item in made if isinstance(item, Failure)]
    assert [failure.ticket for failure in failures] == [broken]
    assert isinstance(failures[0].error, InputError)
    (batch,) = [item for item in made if isinstance(item, Encoded)]
    assert batch.tickets == (tickets[0], tickets[2])


def test_batches_hold_as_many_as_they_may_in_order(
    pipeline: Pipeline, tickets: list[Ticket]
) -> None:
    assert [batch.tickets for batch in encoded(pipeline, tickets, 2)] == [
        (tickets[0], tickets[1]),
        (tickets[2],),
    ]


def test_decoded_pictures_are_those_of_the_pipeline(
    pipeline: Pipeline, tickets: list[Ticket]
) -> None:
    (batch,) = encoded(pipeline, tickets)
    (whole,) = denoised(pipeline, batch)
    (made,) = Decode(pipeline.graphs, Settings())(whole)
    assert isinstance(made, Pictures)
    for ticket, rendering in zip(made.tickets, made.renderings, strict=True):
        (expected,) = pipeline.render([ticket.job.prompt], seed=ticket.seed, schedule="b6")
        np.testing.assert_array_equal(rendering.pixels, expected.pixels)
        assert rendering.metadata == expected.metadata


def test_without_pixels_latents_alone_go_on(pipeline: Pipeline, tickets: list[Ticket]) -> None:
    (batch,) = encoded(pipeline, tickets)
    (whole,) = denoised(pipeline, batch)
    assert isinstance(whole, Latents)
    (made,) = Decode(pipeline.graphs, Settings(), needs_pixels=False)(whole)
    assert isinstance(made, Pictures)
    assert all(rendering.pixels.size == 0 for rendering in made.renderings)
    np.testing.assert_array_equal(
        np.stack([rendering.latent for rendering in made.renderings]), whole.latents
    )


def test_a_failure_passes_through_all_stages(pipeline: Pipeline, tickets: list[Ticket]) -> None:
    failure = Failure(tickets[0], RenderError("no"))
    assert Denoise(pipeline.graphs, Settings())(failure) == [failure]
    assert Decode(pipeline.graphs, Settings())(failure) == [failure]
