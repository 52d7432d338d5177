"""FLUX.1-dev at 1024x1024: time of an evaluation and a picture, against torch in the same run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scripts.gpu import record
from scripts.gpu.bench import Bench, build_plans
from scripts.gpu.real_model import ALL_BLOCKS, RealModel, fitting_blocks, prepared_model
from scripts.gpu.record import Check, measured
from scripts.gpu.timing import Step, interleaved_ms

from meancache_trt.engine.tensorrt.library import FLAVOURS
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.render import Pipeline, load
from meancache_trt.session import Session

PREPARE = "real-size-prepare"
PREPARE_ABOUT = "export FLUX.1-dev with random weights and build its plans (kept for real-size)"
NAME = "real-size"
ABOUT = "FLUX.1-dev at 1024x1024: ms an evaluation, s a picture, against torch and torch.compile"

BUDGETS = (50, 15, 10)
_STEPS = 50
_FEW = {50: 4, 15: 3, 10: 2}
"""What a rehearsal evaluates instead."""

_GUIDANCE = 3.5
_EAGER = "torch eager"
_BESIDES = "the denoising loop alone: no text encoder, no VAE"


def prepare(bench: Bench) -> Iterator[Check]:
    """The bundle, and a plan by each TensorRT; what is there is kept, so that a call may be cut."""
    settings = bench.settings
    blocks = settings.blocks or ((1, 1) if settings.is_rehearsal else _fitting(settings.backends))
    model = RealModel(settings.work, blocks, settings.is_rehearsal)
    if blocks != ALL_BLOCKS:
        asked = "as asked for" if settings.blocks else "what there is room for"
        why = f"{model.name}, not the published 19 + 38: {asked}. Times are of this network"
        yield Check(name="reduced", verdict="measured", note=why)

    def export() -> Check:
        begin = time.monotonic()
        weights = model.bundle().export.components["transformer"].weight_bytes
        note = f"{model.name}, weights {weights / 1e9:.2f} GB"
        return measured("export", time.monotonic() - begin, "s", note)

    yield from bench.attempt("export", export, "", model.name)
    for backend in settings.backends:
        if backend in FLAVOURS:
            yield from bench.attempt("plan", lambda name=backend: _plan(model, name), backend, "")


def _fitting(backends: tuple[str, ...]) -> tuple[int, int]:
    # torch's two share their weights; ONNX Runtime's graphs on CUDA are float32.
    return fitting_blocks(1 + sum(1 if backend in FLAVOURS else 2 for backend in backends))


def _plan(model: RealModel, flavour: str) -> Check:
    begin = time.monotonic()
    build_plans(model.bundle(), flavour)
    return measured("plans", time.monotonic() - begin, "s", "0 s where they were there")


def run(bench: Bench) -> Iterator[Check]:
    """Every backend beside torch, in one process, in turns."""
    settings = bench.settings
    model = prepared_model(settings.work, is_tiny=settings.is_rehearsal)
    if model is None:
        yield from prepare(bench)
        model = prepared_model(settings.work, is_tiny=settings.is_rehearsal)
    if model is None:
        yield record.failed(NAME, f"there is no bundle; see {PREPARE}")
        return
    with contextlib.ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for backend in settings.backends:
            opened = bench.attempt(
                "open", lambda name=backend: _open(stack, model, name, runners), backend, model.name
            )
            yield from opened
        yield from bench.attempt("torch", lambda: _open_torch(bench, model, runners), "torch", "")
        yield from _race(bench, model, runners)


class Runner:
    """One way to run the network: a loop for each budget, and what waits for it."""

    def __init__(self, loops: Mapping[int, Step], wait: Step) -> None:
        self.loops, self.wait = loops, wait


def schedules(pipeline: Pipeline, *, is_short: bool) -> dict[int, Schedule]:
    """AB2 on even nodes: which rule it is changes no time, since all of them fold."""
    found = {}
    for budget in BUDGETS:
        count = _FEW[budget] if is_short else budget
        grid = pipeline.grid(_FEW[BUDGETS[0]] if is_short else _STEPS)
        nodes = np.linspace(0, grid.steps, count, endpoint=False).astype(int).tolist()
        found[budget] = bake("ab2", grid, nodes)
    return found


def _open(
    stack: contextlib.ExitStack, model: RealModel, backend: str, runners: dict[str, Runner]
) -> Iterator[Check]:
    pipeline = stack.enter_context(load(model.directory, backend=backend, embedding_cache="off"))
    begin = time.monotonic()
    loops: dict[int, Step] = {}
    for budget, schedule in schedules(pipeline, is_short=model.is_tiny).items():
        session = Session(pipeline.graphs, schedule, pipeline.resolution())
        _feed(session, pipeline)
        loops[budget] = session.loop.run
    runners[backend] = Runner(loops, pipeline.runtime.synchronize)
    precision = pipeline.graphs.network("transformer").precision
    note = f"network in {precision}; {pipeline.runtime.name} {pipeline.runtime.version}"
    yield measured("opening, with a session for each budget", time.monotonic() - begin, "s", note)


def _feed(session: Session, pipeline: Pipeline) -> None:
    """Random embeddings and noise, by one run of the whole session (which decodes, too)."""
    generator = np.random.default_rng(0)
    transformer = pipeline.bundle.export.components["transformer"]
    sizes = {**pipeline.resolution().symbols, "batch": 1, "two_batch": 2}
    conditioning = {
        name: generator.standard_normal(record.resolved(sizes)).astype(record.dtype)
        for name, record in transformer.inputs.items()
        if record.role in ("conditioning", "text_mask")
    }
    noise = generator.standard_normal((1, *pipeline.resolution().noise_shape))
    session.run(noise.astype(np.float32), conditioning, _GUIDANCE)


def _open_torch(bench: Bench, model: RealModel, runners: dict[str, Runner]) -> Iterator[Check]:
    import torch  # noqa: PLC0415  (slow, and not needed to list slices)
    from scripts.gpu.torch_loop import TorchLoop  # noqa: PLC0415

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not model.is_tiny:
        yield record.skipped("torch", "the torch that is installed has no CUDA")
        return
    with load(model.directory, backend="onnxruntime", embedding_cache="off") as pipeline:
        chosen = schedules(pipeline, is_short=model.is_tiny)
    network = model.in_torch(device)
    loop = TorchLoop(network, model.side, model.text_tokens, device)
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    runners[_EAGER] = Runner(_loops(loop, chosen), wait)
    if bench.settings.is_rehearsal:
        yield record.skipped("torch.compile", "a rehearsal has no time for it")
        return
    compiled = TorchLoop(torch.compile(network), model.side, model.text_tokens, device)
    begin = time.monotonic()
    compiled.run(chosen[BUDGETS[-1]])
    wait()
    runners["torch.compile"] = Runner(_loops(compiled, chosen), wait)
    yield measured("torch.compile, cold", time.monotonic() - begin, "s", "its first loop of 10")


def _loops(loop: Any, chosen: Mapping[int, Schedule]) -> dict[int, Step]:
    return {budget: lambda one=schedule: loop.run(one) for budget, schedule in chosen.items()}


def _nothing() -> None:
    """Wait for nothing: work on the CPU is done when it returns."""


def _race(bench: Bench, model: RealModel, runners: Mapping[str, Runner]) -> Iterator[Check]:
    """The smallest budget first: it says what the others will take."""

    def wait() -> None:
        for runner in runners.values():
            runner.wait()

    each_s = 0.0  # one evaluation of every runner
    for budget in sorted(BUDGETS):
        count = _FEW[budget] if model.is_tiny else budget
        rounds = _rounds(bench, count * each_s)
        if rounds is None:
            why = f"a round of all takes {count * each_s:.0f} s, which the slice no longer has"
            yield record.skipped(f"{count} evaluations", why)
            continue
        ways = {name: runner.loops[budget] for name, runner in runners.items()}
        found = bench.attempt(
            f"{count} evaluations",
            lambda ways=ways, rounds=rounds, count=count: _times(ways, wait, rounds, count),
            "",
            model.name,
        )
        yield from found
        each_s = sum(check.value or 0.0 for check in found if check.unit == "s") / count


def _rounds(bench: Bench, round_s: float) -> tuple[int, int] | None:
    """How many rounds of so many seconds there is time for: untimed and timed; None for none."""
    for untimed, timed in ((2, min(bench.settings.rounds, 5)), (1, 3), (1, 1), (0, 1)):
        if (untimed + timed) * round_s < bench.remaining_s:
            return untimed, timed
    return None


def _times(
    ways: Mapping[str, Step], wait: Step, rounds: tuple[int, int], evaluations: int
) -> list[Check]:
    untimed, timed = rounds
    times = interleaved_ms(ways, wait, timed, warm_ups=untimed)
    checks = []
    for name, value in times.items():
        against = f"median of {timed}; "
        if name != _EAGER and _EAGER in times:
            against += f"{times[_EAGER] / value:.2f} x as fast as {_EAGER}; "
        checks += [
            measured(f"an evaluation, of {evaluations}", value / evaluations, "ms", backend=name),
            measured(
                f"{evaluations} evaluations", value / 1e3, "s", against + _BESIDES, backend=name
            ),
        ]
    return checks
