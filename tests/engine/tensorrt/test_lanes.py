from __future__ import annotations

import numpy as np
import pytest

from meancache_trt.engine.tensorrt.runtime import TensorRtRuntime
from meancache_trt.errors import RenderError
from meancache_trt.meancache.runtime import Tensor
from tests.engine.tensorrt.conftest import Opened, expected, run, schedule_of, session_on
from tests.fakes.cuda import RuleBroken

BUDGET = 2


def decoder_call(fake: Opened, runtime: TensorRtRuntime, latent: Tensor):
    component = fake.bundle.export.components["vae_decoder"]
    batch, rows, columns, _ = latent.shape
    image = runtime.zeros((batch, 3, 8 * rows, 8 * columns), "float32")
    graph = runtime.load(fake.bundle.component_path(component))
    names = (component.input_named("latent_grid"), component.output_named("image"))
    return graph.bind(dict(zip(names, (latent, image), strict=True))), image


def latent_of(fake: Opened, runtime: TensorRtRuntime) -> Tensor:
    shape = (1, *fake.bundle.export.resolution.decode_shape)
    return runtime.tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def test_a_lane_has_its_own_stream_contexts_and_activations_and_shares_engines(
    fake: Opened,
) -> None:
    lane = fake.runtime.lane()
    latent = latent_of(fake, fake.runtime)
    calls = [decoder_call(fake, runtime, latent)[0] for runtime in (fake.runtime, lane)]
    assert lane.stream.handle != fake.runtime.stream.handle
    assert lane.block.pointer != fake.runtime.block.pointer
    assert calls[0].context is not calls[1].context
    assert fake.world.alive == {"context": 2, "engine": 1, "runtime": 1}


def test_lanes_overlap_and_give_the_same(fake: Opened) -> None:
    """Work of both is under way at once, which the fake allows with memory of their own only."""
    lane = fake.runtime.lane()
    latent = latent_of(fake, fake.runtime)
    (one, image), (other, second) = (
        decoder_call(fake, runtime, latent) for runtime in (fake.runtime, lane)
    )
    one.enqueue()
    other.enqueue()
    assert fake.runtime.stream.pending  # type: ignore[attr-defined]
    assert lane.stream.pending  # type: ignore[attr-defined]
    assert np.array_equal(image.read(), second.read())


def test_a_whole_loop_runs_on_a_lane_beside_another(fake: Opened) -> None:
    lane = fake.runtime.lane()
    sessions = [session_on(fake.bundle, on, schedule_of(BUDGET)) for on in (fake.runtime, lane)]
    for seed in range(3):
        wanted = expected(fake.bundle, schedule_of(BUDGET), seed)
        for session in sessions:
            assert np.array_equal(run(session, fake.bundle, seed).pictures, wanted.pictures)
    assert fake.device.launches == 4


def test_a_lane_waits_for_what_another_makes(fake: Opened) -> None:
    lane = fake.runtime.lane()
    latent = latent_of(fake, fake.runtime)
    call, image = decoder_call(fake, fake.runtime, latent)
    copy, copied = decoder_call(fake, lane, latent)
    wanted = _decoded(call, image)
    latent.write(np.zeros(latent.shape, np.float32))
    call.enqueue()
    waits = fake.device.waits
    lane.wait_for(fake.runtime)
    copy.enqueue()
    assert fake.device.waits == waits  # the host did not
    copied.read()
    assert not fake.runtime.stream.pending  # type: ignore[attr-defined]
    assert not np.array_equal(copied.read(), wanted)


def test_a_sequence_of_calls_of_two_lanes_is_refused(fake: Opened) -> None:
    lane = fake.runtime.lane()
    latent = latent_of(fake, fake.runtime)
    calls = [decoder_call(fake, runtime, latent)[0] for runtime in (fake.runtime, lane)]
    with pytest.raises(RenderError, match="bind all of them on one lane"):
        fake.runtime.sequence(calls)


def test_calls_that_are_wrapped_to_be_measured_run_one_by_one(fake: Opened) -> None:
    call, _ = decoder_call(fake, fake.runtime, latent_of(fake, fake.runtime))

    class Measured:
        count = 0

        def enqueue(self) -> None:
            self.count += 1
            call.enqueue()

    measured = Measured()
    sequence = fake.runtime.sequence([measured, call])
    for _ in range(3):
        sequence.enqueue()
    assert measured.count == 3
    assert fake.device.launches == 0


def test_a_closed_lane_leaves_the_others_open(fake: Opened) -> None:
    latent = latent_of(fake, fake.runtime)
    with fake.runtime.lane() as lane:
        call, image = decoder_call(fake, lane, latent)
        call.enqueue()
        first = image.read()
    with pytest.raises(RenderError, match="closed"):
        call.enqueue()
    kept, second = decoder_call(fake, fake.runtime, latent)
    assert np.array_equal(_decoded(kept, second), first)


def test_closing_the_runtime_closes_its_lanes(fake: Opened) -> None:
    lane = fake.runtime.lane()
    call, _ = decoder_call(fake, lane, latent_of(fake, fake.runtime))
    fake.runtime.close()
    with pytest.raises(RenderError, match="closed"):
        call.enqueue()
    assert fake.world.alive == {"context": 0, "engine": 0, "runtime": 0}


def test_lanes_that_shared_activations_would_be_found(fake: Opened) -> None:
    """The fake refuses it: what the tests above show would else prove nothing."""
    lane = fake.runtime.lane()
    latent = latent_of(fake, fake.runtime)
    one, other = (decoder_call(fake, on, latent)[0] for on in (fake.runtime, lane))
    one.enqueue()
    block = fake.runtime.block
    other.context.native.set_device_memory(block.pointer, block.size_bytes)
    other.context._generation = lane.block.generation
    with pytest.raises(RuleBroken, match="two streams share memory for activations"):
        other.enqueue()


def _decoded(call, image: Tensor) -> np.ndarray:
    call.enqueue()
    return image.read()
