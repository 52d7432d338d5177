"""Every GPU backend against ONNX Runtime on the CPU, and against itself in other ways to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import msgspec
import numpy as np
from scripts.gpu import bounds, hosts
from scripts.gpu.bench import SAMPLES, Bench, Pair
from scripts.gpu.bounds import largest_difference, psnr
from scripts.gpu.record import Check, equal, judged, skipped
from scripts.gpu.update import update_equals_numpy
from scripts.gpu.watched import Watched

from meancache_trt.bundle import Bundle
from meancache_trt.errors import RenderError
from meancache_trt.graphs import Graphs
from meancache_trt.manifest import TiledAxis, Tiling
from meancache_trt.session import Session

NAME = "correctness"
ABOUT = "GPU loop against the CPU loop, graph against no graph, batch, VAE, update, hosts' memory"


def run(bench: Bench) -> Iterator[Check]:
    """All checks, for every backend and stand-in."""
    return bench.over_pairs(NAME, lambda pair, backend: _examine(bench, pair, backend))


def _examine(bench: Bench, pair: Pair, backend: str) -> Iterator[Check]:
    for name, check in CHECKS.items():
        yield from bench.attempt(name, lambda check=check: check(pair), backend, pair.subject)


def latents_equal_the_reference(pair: Pair) -> Check:
    """The loop's result against the CPU's."""
    bound = bounds.LATENTS[pair.precision]
    difference = largest_difference(pair.found.latents, pair.expected.latents)
    note = f"network in {pair.precision}"
    return judged("latents", difference, bound.value, reason=bound.reason, note=note)


def pictures_equal_the_reference(pair: Pair) -> Check:
    """Decoded pictures against the CPU's."""
    bound = bounds.PSNR[pair.precision]
    found = psnr(pair.found.pictures, pair.expected.pictures)
    return judged("pictures", found, bound.value, unit="dB", is_lower=True, reason=bound.reason)


def a_captured_graph_equals_plain_calls(pair: Pair) -> Iterable[Check]:
    """The loop as one CUDA graph against the same calls enqueued one by one."""
    watched = Watched(pair.tested.runtime)
    replayed = pair.replayed(pair.session(runtime=watched)).latents
    yield _is_captured(watched)
    plain = pair.session(runtime=Watched(pair.tested.runtime, is_captured=False))
    latents = pair.render(plain, pair.requests[:1]).latents
    difference = largest_difference(replayed, latents)
    yield equal("captured graph against plain calls", difference, reason=bounds.SAME_WORK)


def _is_captured(watched: Watched) -> Check:
    """Whether the whole loop, which is the longest sequence, ran as one graph the last time."""
    name = "loop captured"
    _, loop = max(watched.sequences, key=lambda pair: pair[0])
    mode = getattr(loop, "mode", None)
    if mode is None:
        return skipped(name, f"{watched.runtime.name} does not say whether it captures a loop")
    note = getattr(loop, "problem", None) or ""
    reason = "it was run three times, and is captured at the second"
    return judged(name, int(mode != "captured"), 0.0, reason=reason, note=note)


def a_callback_changes_nothing(pair: Pair) -> Iterable[Check]:
    """One graph an evaluation against one graph of all; the callback hears of each."""
    session, budget = pair.session(), pair.schedule.budget
    for run in ("plain", "captured", "replayed"):
        heard: list[tuple[int, int]] = []
        batch = pair.render(
            session, pair.requests[:1], lambda *counts, heard=heard: heard.append(counts)
        )
        difference = largest_difference(pair.found.latents, batch.latents)
        yield equal(f"callback against none, {run}", difference, reason=bounds.SAME_WORK)
        missed = heard != [(done, budget) for done in range(1, budget + 1)]
        yield equal(f"callbacks missed, {run}", int(missed), reason="one after each evaluation")


def a_second_run_equals_the_first(pair: Pair) -> Check:
    """Nothing of a picture is left for the next one."""
    session = pair.session()
    first = pair.render(session, pair.requests[:1])
    pair.render(session, pair.requests[1:2])
    again = pair.render(session, pair.requests[:1])
    difference = largest_difference(first.latents, again.latents)
    return equal("a run again, after another", difference, reason=bounds.SAME_WORK)


def a_batch_equals_singles(pair: Pair) -> Check:
    """Four pictures at once against one by one."""
    together = pair.render(pair.session(batch=SAMPLES), pair.requests).latents
    single = pair.session()
    alone = [pair.render(single, [request]).latents for request in pair.requests]
    bound = bounds.BATCH[pair.precision]
    difference = largest_difference(together, np.concatenate(alone))
    return judged(f"batch of {SAMPLES}", difference, bound.value, reason=bound.reason)


def the_decoder_equals_the_reference(pair: Pair) -> Iterable[Check]:
    """The VAE on the same latents, whole and in tiles of half the size."""
    latents = pair.expected.latents
    bound = bounds.PSNR[pair.tested.graphs.network("vae_decoder").precision]
    for name, tiling in (("whole", None), ("tiled", _halved(pair))):
        if name == "tiled" and tiling is None:
            yield skipped("VAE tiled", "the bundle says of no tiles in space")
            continue
        found, expected = (
            _tiled_session(pipeline.graphs, pair, tiling).decode(latents, vae_tiling=bool(tiling))
            for pipeline in (pair.tested, pair.reference)
        )
        yield judged(
            f"VAE {name}",
            psnr(found, expected),
            bound.value,
            unit="dB",
            is_lower=True,
            reason=bound.reason,
        )


def _halved(pair: Pair) -> Tiling | None:
    """The bundle's tiles in space, made so small that the stand-in's latent has several."""
    export = pair.reference.bundle.export
    if export.tiling is None or not export.tiling.space:
        return None
    grid = (1, *export.resolution.decode_shape)
    axes = [_halved_axis(axis, grid[axis.latent_axis]) for axis in export.tiling.space]
    return msgspec.structs.replace(export.tiling, space=tuple(axes))


def _halved_axis(axis: TiledAxis, length: int) -> TiledAxis:
    tile = length // 2
    stride = tile - tile // 4
    return msgspec.structs.replace(
        axis, longest_whole=tile, tile=tile, stride=stride, blend=(tile - stride) * axis.samples
    )


def _tiled_session(graphs: Graphs, pair: Pair, tiling: Tiling | None) -> Session:
    bundle = graphs.bundle
    if tiling is not None:
        export = msgspec.structs.replace(bundle.export, tiling=tiling)
        manifest = msgspec.structs.replace(bundle.manifest, export=export)
        bundle = Bundle(bundle.directory, manifest)
    return Session(Graphs(bundle, graphs.runtime), pair.schedule, pair.tested.resolution())


def text_encoders_equal_the_reference(pair: Pair) -> Check:
    """Embeddings of a prompt by the graphs of the text encoders."""
    name = "text encoders"
    if not pair.tested.bundle.export.text_graphs():
        return skipped(name, "torch encodes the prompts of this family")
    prompt = pair.requests[0].positive.prompts
    found, expected = (side.encode(prompt).tensors for side in (pair.tested, pair.reference))
    relative = max(
        largest_difference(found[key], expected[key]) / float(np.abs(expected[key]).max())
        for key in expected
    )
    return judged(
        name,
        relative,
        0.05,
        reason="of the largest value; bfloat16 keeps 8 bits (0.4 %), over some layers",
    )


class _CancelledError(Exception):
    pass


def a_cancelled_session_can_be_used_again(pair: Pair) -> Iterable[Check]:
    """An exception in the callback reaches the caller, and the next run is whole."""

    def cancel(done: int, budget: int) -> None:
        del budget
        if done == 2:
            raise _CancelledError

    session = pair.session()
    reached = 1
    try:
        pair.render(session, pair.requests[:1], cancel)
    except _CancelledError:
        reached = 0
    yield equal("cancelled runs that went on", reached, reason="the callback raised")
    again = pair.render(session, pair.requests[:1]).latents
    difference = largest_difference(pair.found.latents, again)
    yield equal("run after a cancelled one", difference, reason=bounds.SAME_WORK)


def nan_is_reported_and_forgotten(pair: Pair) -> Iterable[Check]:
    """NaN ends in an error, and does not reach the next picture through old velocities."""
    session = pair.session()
    request = pair.requests[0]
    spoilt = replace(request, noise=np.full_like(request.noise, np.nan))
    unreported = 1
    try:
        pair.render(session, [spoilt])
    except RenderError:
        unreported = 0
    yield equal("NaN that was not reported", unreported, reason="all noise was NaN")
    again = pair.render(session, [request]).latents
    difference = largest_difference(pair.found.latents, again)
    yield equal("run after NaN", difference, reason=bounds.SAME_WORK)


Look = Callable[[Pair], Check | Iterable[Check]]
CHECKS: dict[str, Look] = {
    "latents": latents_equal_the_reference,
    "pictures": pictures_equal_the_reference,
    "captured graph": a_captured_graph_equals_plain_calls,
    "callback": a_callback_changes_nothing,
    "second run": a_second_run_equals_the_first,
    "batch": a_batch_equals_singles,
    "VAE": the_decoder_equals_the_reference,
    "update": update_equals_numpy,
    "text encoders": text_encoders_equal_the_reference,
    "cancelling": a_cancelled_session_can_be_used_again,
    "NaN": nan_is_reported_and_forgotten,
    "two sessions": hosts.two_sessions_do_not_disturb_each_other,
    "memory of a host": hosts.memory_of_torch_is_shared,
    "stream of a host": hosts.a_stream_of_torch_is_used,
    "lanes": hosts.lanes_overlap,
}
"""Each check by what it looks at; it is one function of a `Pair`."""
