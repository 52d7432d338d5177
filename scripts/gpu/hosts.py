"""Memory, streams and lanes, as a host that has torch of its own uses them."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scripts.gpu import bounds
from scripts.gpu.bench import Pair
from scripts.gpu.bounds import largest_difference
from scripts.gpu.record import Check, equal, judged, measured, skipped

from meancache_trt.engine.select import open_runtime
from meancache_trt.graphs import Graphs
from meancache_trt.meancache.runtime import Runtime, Tensor
from meancache_trt.session import Session

Array = NDArray[np.float32]


def two_sessions_do_not_disturb_each_other(pair: Pair) -> Check:
    """Two loops enqueued without waiting in between, on one runtime."""
    sessions = [_warm(pair, pair.tested.graphs) for _ in range(2)]
    starts = [_start(session, seed) for seed, session in enumerate(sessions)]
    expected = [_alone(session, start) for session, start in zip(sessions, starts, strict=True)]
    found = _together(sessions, starts, pair.tested.runtime.synchronize)
    difference = _largest(found, expected)
    return equal("two sessions back to back", difference, reason=bounds.SAME_WORK)


def lanes_overlap(pair: Pair) -> Iterable[Check]:
    """Two queues of one backend, each with a stream of its own, at work at the same time."""
    name = "two lanes"
    with _second(pair) as other:
        lanes = [pair.tested.graphs, Graphs(pair.tested.bundle, other)]
        sessions = [_warm(pair, graphs) for graphs in lanes]
        starts = [_start(session, seed) for seed, session in enumerate(sessions)]
        expected = [_alone(session, start) for session, start in zip(sessions, starts, strict=True)]

        def wait() -> None:
            pair.tested.runtime.synchronize()
            other.synchronize()

        found = _together(sessions, starts, wait)
        yield equal(name, _largest(found, expected), reason=bounds.SAME_WORK)
        alone_ms = sum(_timed([session], starts, wait) for session in sessions)
        ratio = alone_ms / _timed(sessions, starts, wait)
        yield measured("two lanes, speed-up", ratio, "x", "1 where they do not overlap")


def _second(pair: Pair) -> Runtime:
    """A lane of the runtime under test, or a runtime of its own where it has no lanes."""
    runtime: Any = pair.tested.runtime
    if not hasattr(runtime, "lane"):
        return open_runtime(pair.backend, bundle=pair.tested.bundle)
    lane: Runtime = runtime.lane()
    return lane


def memory_of_torch_is_shared(pair: Pair) -> Iterable[Check]:
    """The update graph reads and writes torch's own tensors, and torch reads the runtime's."""
    name = "DLPack in"
    if importlib.util.find_spec("torch") is None:
        yield skipped(name, "torch is not installed")
        return
    import torch  # noqa: PLC0415  (slow, and not needed by other checks)

    runtime = pair.tested.runtime
    if runtime.device != "cpu" and not torch.cuda.is_available():
        yield skipped(name, "the torch that is installed has no CUDA")
        return
    component = pair.tested.bundle.export.update_for(1)
    shape = (1, *pair.tested.resolution().latent_shape)
    latent = torch.randn(shape, device=runtime.device)
    moved, velocity = torch.zeros_like(latent), torch.zeros_like(latent)
    lent: dict[str, Any] = {"latent": latent, "next_latent": moved, "velocity": velocity}
    tensors: dict[str, Tensor] = {key: runtime.from_dlpack(one) for key, one in lent.items()}
    for key, record in {**component.inputs, **component.outputs}.items():
        if key not in tensors:
            sizes = {**pair.tested.resolution().symbols, "batch": 1, "two_batch": 2}
            filled = np.full(record.resolved(sizes), 0.5, record.dtype)
            tensors[key] = runtime.tensor(filled)
    pair.tested.graphs.graph(component).bind(tensors).enqueue()
    runtime.synchronize()
    expected = latent + 0.5 * velocity
    unwritten = int((velocity == 0).sum())
    yield equal("DLPack in, values not written", unwritten, reason="all of them are 0.5")
    yield judged(
        name,
        float((moved - expected).abs().max()),
        1e-6,
        reason="one product and one sum of values near 1 in float32, perhaps fused",
    )
    yield _out(runtime, tensors["next_latent"], torch)


def _out(runtime: Runtime, tensor: Tensor, torch: Any) -> Check:
    name = "DLPack out"
    if not hasattr(tensor, "__dlpack__"):
        return skipped(name, f"tensors of {runtime.name} have no __dlpack__")
    difference = largest_difference(torch.from_dlpack(tensor).cpu().numpy(), tensor.read())
    return equal(name, difference, reason="the same memory")


def a_stream_of_torch_is_used(pair: Pair) -> Check:
    """A session on a stream that torch made, against one on the runtime's own."""
    name = "external stream"
    if pair.tested.runtime.device == "cpu":
        return skipped(name, "the CPU has no streams")
    if importlib.util.find_spec("torch") is None:
        return skipped(name, "torch is not installed")
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return skipped(name, "the torch that is installed has no CUDA")
    stream = torch.cuda.Stream()
    bundle = pair.tested.bundle
    with open_runtime(pair.backend, bundle=bundle, stream=stream.cuda_stream) as runtime:
        session = pair.session(runtime=runtime)
        latents = pair.render(session, pair.requests[:1]).latents
    difference = largest_difference(pair.found.latents, latents)
    return equal(name, difference, reason=bounds.SAME_WORK)


def _warm(pair: Pair, graphs: Graphs) -> Session:
    """A session that has rendered, so that its conditioning is in place."""
    session = Session(graphs, pair.schedule, pair.tested.resolution())
    pair.render(session, pair.requests[:1])
    return session


def _start(session: Session, seed: int) -> Array:
    noise = np.random.default_rng(seed).standard_normal(session.loop.initial.shape)
    return noise.astype(np.float32)


def _enqueue(session: Session, start: Array) -> None:
    loop = session.loop
    loop.initial.write(start)
    if loop.initial_input is not loop.initial:
        loop.initial_input.write(np.concatenate([start, start]))
    loop.run()


def _alone(session: Session, start: Array) -> Array:
    _enqueue(session, start)
    return session.loop.result()


def _together(
    sessions: Sequence[Session], starts: Sequence[Array], wait: Callable[[], None]
) -> list[Array]:
    for session, start in zip(sessions, starts, strict=True):
        _enqueue(session, start)
    wait()
    return [session.loop.result() for session in sessions]


def _timed(sessions: Sequence[Session], starts: Sequence[Array], wait: Callable[[], None]) -> float:
    """Milliseconds of the sessions' loops, the second time they run."""
    begin = 0.0
    for _ in range(2):
        for session, start in zip(sessions, starts, strict=False):
            session.loop.initial.write(start)
        wait()
        begin = time.perf_counter()
        for session in sessions:
            session.loop.run()
        wait()
    return 1e3 * (time.perf_counter() - begin)


def _largest(found: Sequence[Array], expected: Sequence[Array]) -> float:
    return max(largest_difference(a, b) for a, b in zip(found, expected, strict=True))
