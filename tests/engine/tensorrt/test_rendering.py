"""Whole renders on the fake TensorRT, compared with ONNX Runtime: the fake runs the same kernels,
so results have the same bits."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.library import Flavour
from meancache_trt.engine.tensorrt.record import BuildOptions, ShapeRange
from meancache_trt.errors import RenderError
from meancache_trt.manifest import batch_symbols
from meancache_trt.render import Pipeline
from tests.engine.tensorrt.conftest import (
    SCALE,
    Open,
    Opened,
    assert_equal,
    expected,
    inputs_of,
    run,
    schedule_of,
)
from tests.fakes.cuda import FakeDevice
from tests.fakes.plans import Change, add_plan, plan_everything

BUDGET = 4


def test_every_run_has_the_bits_of_onnx_runtime(fake: Opened) -> None:
    session = fake.session(schedule_of(BUDGET))
    for seed in range(3):  # plain, captured, replayed
        found = run(session, fake.bundle, seed)
        assert_equal(found, expected(fake.bundle, schedule_of(BUDGET), seed))


def test_from_the_second_image_on_the_loop_is_one_graph_launch(fake: Opened) -> None:
    session = fake.session(schedule_of(BUDGET))
    launches, enqueued = [], []
    for seed in range(4):
        before = fake.device.launches, len(fake.device.enqueued)
        run(session, fake.bundle, seed)
        launches.append(fake.device.launches - before[0])
        enqueued.append(len(fake.device.enqueued) - before[1])
    assert launches == [0, 1, 1, 1]
    assert enqueued == [2 * BUDGET + 2, 2, 2, 2]  # prepare and decoder run by themselves
    assert len(fake.device.graphs) == 1
    assert fake.runtime.notes == ()


def test_with_a_callback_each_evaluation_is_one_graph_launch(fake: Opened) -> None:
    session = fake.session(schedule_of(BUDGET))
    wanted = expected(fake.bundle, schedule_of(BUDGET))
    told: list[tuple[int, int]] = []
    for launches in (0, BUDGET, BUDGET):
        before = fake.device.launches
        callback = lambda done, budget: told.append((done, budget))  # noqa: E731
        found = run(session, fake.bundle, on_evaluation=callback)
        assert fake.device.launches - before == launches
        assert_equal(found, wanted)
    assert told == 3 * [(done, BUDGET) for done in range(1, BUDGET + 1)]


def test_a_loop_that_is_never_run_with_a_callback_captures_no_graphs_for_it(fake: Opened) -> None:
    session = fake.session(schedule_of(BUDGET))
    for seed in range(2):
        run(session, fake.bundle, seed)
    assert len(fake.device.graphs) == 1


def test_the_host_does_not_wait_inside_the_loop(fake: Opened) -> None:
    session = fake.session(schedule_of(BUDGET))
    for seed in range(3):
        run(session, fake.bundle, seed)
        before = fake.device.waits
        session.loop.run()
        assert fake.device.waits == before
        fake.runtime.synchronize()


def test_schedules_and_batches_may_alternate(fake: Opened) -> None:
    wanted = {
        (budget, batch): expected(fake.bundle, schedule_of(budget), budget, batch)
        for budget in (2, 3)
        for batch in (1, 2)
    }
    sessions = {key: fake.session(schedule_of(key[0]), key[1]) for key in wanted}
    for _ in range(3):
        for (budget, batch), session in sessions.items():
            found = run(session, fake.bundle, budget, batch)
            assert_equal(found, wanted[budget, batch])
    assert len(fake.device.graphs) == len(sessions)


def test_a_larger_batch_moves_the_activations_and_graphs_are_captured_again(fake: Opened) -> None:
    small = fake.session(schedule_of(BUDGET))
    for seed in range(2):
        run(small, fake.bundle, seed)
    generation, size = fake.runtime.block.generation, fake.runtime.block.size_bytes
    large = fake.session(schedule_of(BUDGET), batch=3)
    assert_equal(run(large, fake.bundle, 5, 3), expected(fake.bundle, schedule_of(BUDGET), 5, 3))
    assert fake.runtime.block.generation > generation
    assert fake.runtime.block.size_bytes > size
    launches = []
    for seed in range(3):  # plainly once more, then as a graph with the new address
        before = fake.device.launches
        assert_equal(
            run(small, fake.bundle, seed), expected(fake.bundle, schedule_of(BUDGET), seed)
        )
        launches.append(fake.device.launches - before)
    assert launches == [0, 1, 1]


def test_contexts_share_one_block_as_large_as_the_largest_needs(fake: Opened) -> None:
    session = fake.session(schedule_of(BUDGET))
    run(session, fake.bundle)
    needs = [
        context.native.update_device_memory_size_for_shapes() for context in fake.runtime._contexts
    ]
    assert len(needs) == 4  # prepare, transformer, update, decoder
    assert max(needs) <= fake.runtime.block.size_bytes < max(needs) + 256


def test_an_exception_in_the_callback_leaves_the_session_usable(fake: Opened) -> None:
    session = fake.session(schedule_of(BUDGET))
    wanted = expected(fake.bundle, schedule_of(BUDGET))

    def cancel(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(session, fake.bundle, on_evaluation=cancel)
        assert_equal(run(session, fake.bundle), wanted)


def test_what_is_not_finite_is_refused_and_does_not_reach_the_next_image(fake: Opened) -> None:
    session = fake.session(schedule_of(BUDGET))
    noise, conditioning = inputs_of(fake.bundle, 1, 0)
    for _ in range(3):
        with pytest.raises(RenderError, match="the latent is not finite"):
            session.run(np.full_like(noise, np.nan), conditioning, SCALE)
        assert_equal(run(session, fake.bundle), expected(fake.bundle, schedule_of(BUDGET)))


def test_an_evaluation_by_itself_has_the_bits_of_onnx_runtime(fake: Opened) -> None:
    session = fake.session(schedule_of(BUDGET))
    _, conditioning = inputs_of(fake.bundle, 1, 0)
    latent = np.random.default_rng(1).standard_normal(session.loop.initial.shape).astype(np.float32)
    found = [session.evaluate(1, latent, conditioning, SCALE) for _ in range(3)]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert np.isfinite(found[0]).all()


@pytest.mark.parametrize(
    ("flavour", "is_old"), [("tensorrt", False), ("tensorrt", True), ("tensorrt_rtx", False)]
)
def test_both_flavours_render(
    bundle: Bundle, open_fake: Open, flavour: Flavour, is_old: bool
) -> None:
    """An old one makes contexts without a runtime configuration."""
    plan_everything(bundle, flavour=flavour)
    with open_fake(flavour=flavour, is_old=is_old) as fake:
        session = fake.session(schedule_of(BUDGET))
        for seed in range(2):
            found = run(session, fake.bundle, seed)
            assert_equal(found, expected(fake.bundle, schedule_of(BUDGET), seed))
        assert fake.device.launches == 1
        assert fake.runtime.name == flavour


@pytest.mark.parametrize(
    ("flavour", "words"),
    [
        ("tensorrt_rtx", "cannot capture transformer: a kernel is not ready"),  # it can be asked
        ("tensorrt", "could not be started: operation not permitted when stream is capturing"),
    ],
)
def test_an_engine_that_cannot_be_captured_runs_call_by_call_and_says_so(
    bundle: Bundle, open_fake: Open, flavour: Flavour, words: str
) -> None:
    plan_everything(bundle, flavour=flavour, only=_others(bundle))
    add_plan(bundle, "transformer", flavour=flavour, change=_changed(is_capturable=False))
    with open_fake(flavour=flavour) as fake:
        session = fake.session(schedule_of(BUDGET))
        for seed in range(3):
            found = run(session, fake.bundle, seed)
            assert_equal(found, expected(fake.bundle, schedule_of(BUDGET), seed))
        assert fake.device.launches == 0
        (note,) = fake.runtime.notes
        assert words in note


@pytest.mark.parametrize(("free", "is_streamed"), [(1 << 21, True), (1 << 40, False)])
def test_streamed_weights_get_the_free_memory_and_are_not_captured(
    bundle: Bundle, open_fake: Open, free: int, is_streamed: bool
) -> None:
    plan_everything(bundle, only=_others(bundle))
    add_plan(
        bundle,
        "transformer",
        profile=_narrow(bundle),
        options=BuildOptions(weight_streaming=True),
        change=_changed(streamable_bytes=1 << 30),
    )
    with open_fake(device=FakeDevice(free=free)) as fake:
        session = fake.session(schedule_of(BUDGET))
        for seed in range(3):
            run(session, fake.bundle, seed)
        assert fake.device.launches == (0 if is_streamed else 2)
        assert any("weights of transformer are streamed" in n for n in fake.runtime.notes) is (
            is_streamed
        )


def test_a_session_that_is_dropped_frees_its_graph_and_contexts(fake: Opened) -> None:
    for budget in (2, 3):
        session = fake.session(schedule_of(budget))
        for seed in range(2):
            run(session, fake.bundle, seed)
        del session
    assert len(fake.device.graphs) == 0
    fake.device.collect()
    assert fake.world.alive["context"] == 0
    assert fake.world.alive["engine"] == 0


def test_everything_goes_in_order(planned: Bundle, open_fake: Open) -> None:
    with open_fake() as fake:
        session = fake.session(schedule_of(BUDGET))
        for seed in range(2):
            run(session, fake.bundle, seed)
    order = fake.device.order
    assert list(dict.fromkeys(order)) == [
        "graph",
        "context",
        "engine",
        "runtime",
        "stream",
        "device",
    ]
    assert [order.count(what) for what in ("graph", "context", "engine")] == [1, 4, 4]


def test_what_was_closed_is_refused(planned: Bundle, open_fake: Open) -> None:
    with open_fake() as fake:
        session = fake.session(schedule_of(BUDGET))
        run(session, fake.bundle)
    path = fake.bundle.component_path(fake.bundle.export.components["prepare"])
    for use in (
        session.loop.run,
        lambda: run(session, fake.bundle),
        lambda: fake.runtime.load(path),
        lambda: fake.runtime.sequence([]),
        fake.runtime.lane,
    ):
        with pytest.raises(RenderError, match="closed"):
            use()


def test_a_hosts_stream_carries_all_work(planned: Bundle, open_fake: Open) -> None:
    device = FakeDevice()
    external = device.adopt_stream()
    with open_fake(device=device, stream=external.handle) as fake:
        session = fake.session(schedule_of(BUDGET))
        assert_equal(run(session, fake.bundle), expected(fake.bundle, schedule_of(BUDGET)))
        assert list(device.streams) == [external.handle]
    assert list(device.streams) == [external.handle]


def test_a_pipeline_renders_the_pictures_of_onnx_runtime(planned: Bundle, open_fake: Open) -> None:
    planned.add_schedule(schedule_of(3))
    with open_fake() as fake:
        with Pipeline(planned, runtime=fake.runtime, embedding_cache="off") as pipeline:
            found = pipeline.render(["one", "two"], seed=[1, 2], schedule=schedule_of(3))
        assert fake.device.launches == 1
        fake.runtime.synchronize()  # the pipeline leaves a runtime that it was given open
    with Pipeline(planned, backend="onnxruntime", threads=1, embedding_cache="off") as pipeline:
        wanted = pipeline.render(["one", "two"], seed=[1, 2], schedule=schedule_of(3))
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def _changed(**changes: object) -> Change:
    return lambda plan: msgspec.structs.replace(plan, **changes)


def _others(bundle: Bundle) -> list[str]:
    return [name for name in bundle.export.components if name != "transformer"]


def _narrow(bundle: Bundle) -> dict[str, ShapeRange]:
    """A profile of the one size that is rendered, so that its activations are small."""
    sizes = {**bundle.export.resolution.symbols, **batch_symbols(1)}
    records = bundle.export.components["transformer"].inputs
    shapes = {name: record.resolved(sizes) for name, record in records.items()}
    return {name: ShapeRange(shape, shape, shape) for name, shape in shapes.items()}
