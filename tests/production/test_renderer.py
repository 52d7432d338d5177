from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import numpy as np
import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.errors import BundleError, InputError, RefusedError, RenderError
from meancache_trt.meancache.schedule import bake
from meancache_trt.production.jobs import Job
from meancache_trt.production.outcomes import Outcome
from meancache_trt.production.renderer import Renderer, RendererOptions
from meancache_trt.production.tickets import Defaults
from meancache_trt.render import Pipeline
from meancache_trt.rendering import Rendering
from tests.conftest import STEPS
from tests.production.gate import LONG_S, Gate


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def gated(shared_bundle: Path, gate: Gate) -> Pipeline:
    return Pipeline(Bundle.open(shared_bundle), runtime=gate, embedding_cache="off")


@pytest.fixture
def start(gated: Pipeline, gate: Gate) -> Iterator[Callable[..., Renderer]]:
    """Makes renderers that are held before their first loop until the gate is opened."""
    short = bake("euler", gated.grid(STEPS), [0, 20], name="short")
    made: list[Renderer] = []

    def started(*, on_outcome=lambda _: None, is_held=True, **options: object) -> Renderer:
        renderer = Renderer(
            gated,
            defaults=Defaults(schedule=short),
            options=RendererOptions(**options),
            on_outcome=on_outcome,
        )
        made.append(renderer.__enter__())
        if is_held:
            gate.close()
        return renderer

    yield started
    gate.open()
    for renderer in made:
        renderer.close()


def make_job(index: int, **fields: object) -> Job:
    return Job(id=f"job-{index}", prompt=f"a fox, number {index}", seed=index, **fields)


def submit_held(renderer: Renderer, gate: Gate, **fields: object) -> Future[Rendering]:
    """A job whose loop has begun and is held."""
    future = renderer.submit(make_job(99, **fields))
    gate.wait_until_reached()
    return future


def wait_until_ready(renderer: Renderer, count: int) -> None:
    end = time.monotonic() + LONG_S
    while renderer.status().ready != count:
        assert time.monotonic() < end
        time.sleep(0.001)


def results(futures: list[Future[Rendering]]) -> list[Rendering]:
    return [future.result(LONG_S) for future in futures]


def assert_equal(found: Rendering, expected: Rendering) -> None:
    assert np.array_equal(found.latent, expected.latent)
    assert np.array_equal(found.pixels, expected.pixels)


@pytest.mark.parametrize("max_batch", [1, 4])
def test_a_picture_is_what_the_pipeline_renders_whatever_its_batch(
    start, gate, pipeline, max_batch
):
    jobs = [make_job(index, schedule="b6" if index % 3 else "b10") for index in range(7)]
    renderer = start(max_batch=max_batch)
    submit_held(renderer, gate)
    futures = [renderer.submit(job) for job in jobs]
    wait_until_ready(renderer, len(jobs))
    gate.open()
    for job, found in zip(jobs, results(futures), strict=True):
        (expected,) = pipeline.render([job.prompt], seed=job.seed, schedule=job.schedule)
        assert_equal(found, expected)
        assert (found.prompt, found.seed, found.schedule) == (job.prompt, job.seed, job.schedule)
        assert found.schedule_digest == expected.schedule_digest


def test_jobs_that_wait_together_share_loops(start, gate):
    renderer = start(max_batch=4)
    first = submit_held(renderer, gate)
    futures = [renderer.submit(make_job(index)) for index in range(4)]
    wait_until_ready(renderer, 4)
    gate.open()
    first.result(LONG_S)
    before = gate.evaluations
    results(futures)
    assert gate.evaluations - before <= 4  # a loop of two evaluations, its start and its end


def test_the_highest_priority_is_rendered_first_then_the_earliest(start, gate):
    renderer = start()
    submit_held(renderer, gate)
    ended: list[int] = []
    futures = []
    for index, priority in enumerate([0, 7, 0, 7]):
        future = renderer.submit(make_job(index), priority=priority)
        future.add_done_callback(lambda _, index=index: ended.append(index))
        futures.append(future)
    wait_until_ready(renderer, 4)
    gate.open()
    renderer.close()
    assert ended == [1, 3, 0, 2]


def test_no_more_jobs_are_taken_on_than_there_is_room_for(start, gate):
    renderer = start(capacity=2)
    futures = [submit_held(renderer, gate), renderer.submit(make_job(1))]
    with pytest.raises(RefusedError, match="2 jobs") as refused:
        renderer.submit(make_job(2))
    assert refused.value.retry_after_s > 0
    gate.open()
    results(futures)
    renderer.submit(make_job(2)).result(LONG_S)
    assert renderer.status().outcomes == {"done": 3, "refused": 1}


def test_a_deadline_that_cannot_be_met_is_refused_at_once(start, gate):
    renderer = start()
    with pytest.raises(RefusedError, match="allow more time") as refused:
        renderer.submit(make_job(1), deadline_s=1e-6)
    assert refused.value.retry_after_s is None
    submit_held(renderer, gate)
    waiting = [renderer.submit(make_job(index, schedule="full")) for index in range(3)]
    enough_s = 2 * renderer.predict_ms(make_job(4)) / 1e3  # for itself, not for those before it
    with pytest.raises(RefusedError, match="try again later") as refused:
        renderer.submit(make_job(4), deadline_s=enough_s)
    assert refused.value.retry_after_s > 0
    for future in waiting:
        future.cancel()


def test_the_longest_job_that_is_taken_on_can_be_limited(start):
    renderer = start(max_predicted_ms=1e-3)
    with pytest.raises(RefusedError, match="limit"):
        renderer.submit(make_job(1))


def test_a_job_whose_deadline_passes_while_it_waits_is_not_rendered(start, gate):
    renderer = start()
    first = submit_held(renderer, gate)
    job = make_job(1)
    deadline_s = 2 * (renderer.wait_ms(job) + renderer.predict_ms(job)) / 1e3
    future = renderer.submit(job, deadline_s=deadline_s)
    time.sleep(deadline_s)
    before = gate.evaluations
    gate.open()
    with pytest.raises(RefusedError, match="nothing was rendered"):
        future.result(LONG_S)
    first.result(LONG_S)
    assert gate.evaluations - before <= 3  # what was left of the first loop
    assert renderer.status().outcomes == {"done": 1, "expired": 1}


def test_a_job_whose_loop_has_begun_is_finished_after_its_deadline(start, gate):
    renderer = start()
    deadline_s = 2 * renderer.predict_ms(make_job(1)) / 1e3 + 1.0
    future = renderer.submit(make_job(1), deadline_s=deadline_s)
    gate.wait_until_reached()
    time.sleep(deadline_s)
    gate.open()
    future.result(LONG_S)
    assert renderer.status().outcomes == {"late": 1}


def test_a_job_that_waits_can_be_cancelled(start, gate):
    renderer = start()
    first = submit_held(renderer, gate)
    future = renderer.submit(make_job(1))
    assert future.cancel()
    assert wait([future], timeout=LONG_S).done == {future}
    assert renderer.status().waiting == 0
    gate.open()
    first.result(LONG_S)
    assert renderer.status().outcomes == {"cancelled": 1, "done": 1}


def test_a_job_that_is_being_rendered_can_be_cancelled(start, gate):
    renderer = start()
    future = submit_held(renderer, gate, schedule="full")
    before = gate.evaluations
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(LONG_S)
    gate.open()
    renderer.close()
    assert gate.evaluations - before <= 1  # of 50
    assert renderer.status().outcomes == {"cancelled": 1}


def test_a_loop_that_is_not_stoppable_runs_to_its_end(start, gate):
    renderer = start(is_stoppable=False)
    before = gate.evaluations
    submit_held(renderer, gate, schedule="full").cancel()
    gate.open()
    renderer.close()
    assert gate.evaluations - before == 2  # one launch: its start and its end


def test_a_job_that_is_cancelled_leaves_the_others_of_its_batch(start, gate, pipeline):
    renderer = start(max_batch=2)
    submit_held(renderer, gate)
    jobs = [make_job(index, schedule="b6") for index in range(2)]
    unwanted, wanted = [renderer.submit(job) for job in jobs]
    wait_until_ready(renderer, 2)
    gate.open()
    unwanted.cancel()
    (expected,) = pipeline.render([jobs[1].prompt], seed=jobs[1].seed, schedule="b6")
    assert_equal(wanted.result(LONG_S), expected)


def test_a_job_that_fails_does_not_take_its_batch_with_it(start, gate, pipeline):
    renderer = start(max_batch=4)
    first = submit_held(renderer, gate)
    jobs = [make_job(index, schedule="b6") for index in range(4)]
    bad, *good = [renderer.submit(job) for job in jobs]
    wait_until_ready(renderer, 4)
    gate.faults = 3  # the first job, the batch of four, and the first of these alone
    gate.open()
    for future in (first, bad):
        with pytest.raises(RenderError, match="stumbled"):
            future.result(LONG_S)
    for job, found in zip(jobs[1:], results(good), strict=True):
        (expected,) = pipeline.render([job.prompt], seed=job.seed, schedule="b6")
        assert_equal(found, expected)
    assert renderer.status().outcomes == {"done": 3, "failed": 2}


def test_jobs_that_are_not_valid_are_the_callers_fault_at_once(start):
    renderer = start(is_held=False)
    with pytest.raises(InputError, match="prompt is empty"):
        renderer.submit(Job(id="a", prompt=" "))
    with pytest.raises(BundleError, match="65x64"):
        renderer.submit(make_job(1, resolution="65x64"))
    with pytest.raises(InputError, match="deadline_s"):
        renderer.submit(make_job(1), deadline_s=0.0)
    assert renderer.status().outcomes == {}


def test_closing_finishes_what_was_taken_on(start, gate):
    renderer = start(max_batch=2, batch_wait_ms=1e9)
    gate.open()
    futures = [renderer.submit(make_job(index)) for index in range(5)]
    renderer.close()
    assert all(future.done() for future in futures)
    assert renderer.status().outcomes == {"done": 5}
    with pytest.raises(RefusedError, match="closed"):
        renderer.submit(make_job(9))


def test_closing_without_draining_cancels_what_was_taken_on(start, gate):
    renderer = start()
    futures = [submit_held(renderer, gate, schedule="full")]
    futures += [renderer.submit(make_job(index)) for index in range(3)]
    closing = threading.Thread(target=lambda: renderer.close(is_drained=False))
    closing.start()
    assert wait(futures, timeout=LONG_S).not_done == set()
    gate.open()
    closing.join()
    assert all(future.cancelled() for future in futures)


def test_no_future_waits_for_a_stage_that_died(start, gate):
    def fail(outcome: Outcome) -> None:
        if outcome.kind == "done":
            raise OSError("the metrics are full")

    renderer = start(on_outcome=fail)
    futures = [submit_held(renderer, gate)]
    futures += [renderer.submit(make_job(index)) for index in range(3)]
    gate.open()
    assert futures[0].result(LONG_S).seed == 99  # it was done before
    for future in futures[1:]:
        with pytest.raises(RenderError, match="the metrics are full"):
            future.result(LONG_S)
    with pytest.raises(RefusedError, match="has stopped"):
        renderer.submit(make_job(9))
    with pytest.raises(OSError, match="the metrics are full"):
        renderer.close()


def test_a_renderer_that_was_not_entered_takes_on_nothing(gated):
    with pytest.raises(RefusedError, match="has not been entered"):
        Renderer(gated).submit(make_job(1))


def test_many_threads_each_get_their_own_pictures(start, pipeline):
    seeds = range(20)
    renderer = start(is_held=False, capacity=200, max_batch=4)
    found: dict[tuple[int, int], Rendering] = {}

    def client(thread: int) -> None:
        order = np.random.default_rng(thread).permutation(seeds)
        futures = {seed: renderer.submit(make_job(int(seed)), priority=thread) for seed in order}
        found.update({(thread, seed): future.result() for seed, future in futures.items()})

    threads = [threading.Thread(target=client, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    short = bake("euler", pipeline.grid(STEPS), [0, 20], name="short")
    for seed in seeds:
        (expected,) = pipeline.render([make_job(seed).prompt], seed=seed, schedule=short)
        for thread in range(8):
            assert_equal(found[thread, seed], expected)
    assert renderer.status().outcomes == {"done": 160}


def test_what_is_predicted_grows_by_one_evaluation_for_each(start):
    renderer = start(is_held=False)
    told = {name: renderer.predict_ms(make_job(1, schedule=name)) for name in ("b6", "b10", "full")}
    evaluation_ms = (told["b10"] - told["b6"]) / 4
    assert evaluation_ms > 0
    assert told["full"] - told["b10"] == pytest.approx(40 * evaluation_ms)


def test_every_job_has_one_outcome(start, gate):
    outcomes: list[Outcome] = []
    renderer = start(on_outcome=outcomes.append, capacity=3)
    submit_held(renderer, gate)
    renderer.submit(make_job(1)).cancel()
    for index in itertools.count(2):
        try:
            renderer.submit(make_job(index))
        except RefusedError:
            break
    gate.open()
    renderer.close()
    assert sorted(found.kind for found in outcomes) == ["cancelled", *["done"] * 3, "refused"]
    assert all(found.latency_ms > 0 for found in outcomes)
    assert all(found.predicted_ms > 0 for found in outcomes if found.kind != "refused")


@pytest.mark.parametrize(
    "options", [{"capacity": 0}, {"max_batch": 0}, {"batch_wait_ms": -1.0}, {"warm": ()}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError, match="a renderer"):
        RendererOptions(**options)


def test_a_panic_of_a_stage_ends_every_job_and_takes_on_no_other(pipeline, monkeypatch):
    """What is no `Exception`, such as a panic of a library in Rust, reaches no handler of jobs."""

    def panic(*_: object) -> None:
        raise SystemExit("a panic")

    def submitted_into_it() -> None:
        with Renderer(pipeline, defaults=Defaults(schedule="b6")) as renderer:
            monkeypatch.setattr("meancache_trt.production.timed_work.TimedWork.decode", panic)
            future = renderer.submit(Job(id="a", prompt="a red circle"))
            with pytest.raises(RenderError, match="has stopped"):
                future.result(timeout=60)
            with pytest.raises(RefusedError, match="has stopped"):
                renderer.submit(Job(id="b", prompt="a red circle"))

    with pytest.raises(SystemExit, match="a panic"):
        submitted_into_it()
