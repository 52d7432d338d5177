"""What the slices work on: bundles of the stand-ins, and each backend beside the CPU's."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from scripts.gpu import record
from scripts.gpu.record import Check
from scripts.gpu.watched import Watched

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.doctor import Verdict, builds_for
from meancache_trt.engine.probe import Driver
from meancache_trt.engine.select import available_backends
from meancache_trt.engine.survey import survey
from meancache_trt.engine.tensorrt.library import FLAVOURS
from meancache_trt.errors import MeanCacheError, PlanError
from meancache_trt.graphs import Graphs
from meancache_trt.meancache.loop import OnEvaluation
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.runtime import Runtime
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import Pipeline, load
from meancache_trt.session import Batch, Session
from meancache_trt.shapes import Range

REFERENCE = "onnxruntime"
"""The backend that every other one is compared with: float32 on the CPU."""

SAMPLES = 4
_NODES, _SPANS = (0, 1, 3, 7, 14, 21, 28, 35, 42, 49), (1, 2, 1, 1, 1, 1, 1, 1, 4)
_FEW_NODES, _FEW_SPANS = (0, 1, 3, 6), (1, 2, 1)


@dataclass(frozen=True)
class Settings:
    """How much is done.

    `limit_s` is what a slice may take, `rounds` how often something is timed, `absent` a skipped
    check for each backend that cannot run here, `precisions` those of graphs beside the float32
    ones.
    """

    work: Path
    backends: tuple[str, ...]
    subjects: tuple[str, ...]
    is_rehearsal: bool
    rounds: int
    cycles: int
    limit_s: float
    absent: tuple[Check, ...] = ()
    precisions: tuple[str, ...] = ()
    blocks: tuple[int, int] | None = None


class Bench:
    """The settings, and a clock that stops a slice before its time is over."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._ends_at = time.monotonic() + settings.limit_s

    @property
    def is_late(self) -> bool:
        """Whether the slice has had its time."""
        return self.remaining_s < 0

    @property
    def remaining_s(self) -> float:
        """What is left of the slice's time."""
        return self._ends_at - time.monotonic()

    def attempt(
        self, name: str, call: Callable[[], Check | Iterable[Check]], backend: str, subject: str
    ) -> list[Check]:
        """What a check finds; where it breaks, or its time is over, a check that says so."""
        if self.is_late:
            why = f"the slice's {self.settings.limit_s:g} s were over; run it alone"
            found: list[Check] = [record.skipped(name, why)]
        else:
            try:
                made = call()
                found = [made] if isinstance(made, Check) else list(made)
            except Exception as error:
                found = [record.failed(name, f"{type(error).__name__}: {error}")]
        return [_placed(one, backend, subject) for one in found]

    def bundle(self, subject: str) -> Bundle:
        """The stand-in's bundle, exported once and then kept in the work folder."""
        target = self.settings.work / f"{subject}.mcb"
        if (target / MANIFEST).is_file():
            return Bundle.open(target)
        checkpoint = stages.find_model(f"standin/{subject}")
        options = stages.ExportOptions(
            size=stages.picture_size(checkpoint, None, None),
            batch=Range.parse(f"1/1/{SAMPLES}"),
            precisions=self.settings.precisions,
            is_parity_checked=False,
        )
        return stages.export(checkpoint, target, options, note=_say, is_forced=False)

    def prepared(self, backend: str, subject: str) -> Bundle:
        """The bundle with the plans that a backend needs; those that are there are reused."""
        bundle = self.bundle(subject)
        if backend in FLAVOURS:
            build_plans(bundle, backend, *_ranges(bundle))
        return Bundle.open(bundle.directory)

    @contextlib.contextmanager
    def pair(self, backend: str, subject: str) -> Iterator[Pair]:
        """A backend and the reference on one bundle."""
        bundle = self.prepared(backend, subject)
        with (
            load(bundle.directory, backend=backend, embedding_cache="off") as tested,
            load(bundle.directory, backend=REFERENCE, embedding_cache="off") as reference,
        ):
            yield Pair(backend, subject, tested, reference, is_short=self.settings.is_rehearsal)

    def over_pairs(
        self, what: str, look: Callable[[Pair, str], Iterator[Check]]
    ) -> Iterator[Check]:
        """Look at every backend on every stand-in; what cannot be opened is a failed check."""
        for backend in self.settings.backends:
            for subject in self.settings.subjects:
                if self.is_late:
                    yield from self.attempt(what, list, backend, subject)
                    continue
                try:
                    with self.pair(backend, subject) as pair:
                        yield from look(pair, backend)
                except (MeanCacheError, ImportError) as error:
                    broken = record.failed("open", f"{type(error).__name__}: {error}")
                    yield msgspec.structs.replace(broken, backend=backend, subject=subject)


@dataclass(frozen=True)
class Request:
    """One picture: noise (1, …), the conditioning of its prompt, and of its negative prompt."""

    noise: NDArray[np.float32]
    positive: Conditioning
    negative: Conditioning | None


class Pair:
    """A pipeline under test beside the reference, with the same requests for both."""

    def __init__(
        self,
        backend: str,
        subject: str,
        tested: Pipeline,
        reference: Pipeline,
        *,
        is_short: bool,
    ) -> None:
        self.backend, self.subject = backend, subject
        self.tested, self.reference = tested, reference
        steps, nodes, spans = (8, _FEW_NODES, _FEW_SPANS) if is_short else (50, _NODES, _SPANS)
        self.schedule = bake("official", reference.grid(steps), nodes, spans)
        self.scale = reference.guidance()

    @property
    def precision(self) -> str:
        """Of the network under test."""
        return self.tested.graphs.network("transformer").precision

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """Prompts of the stand-in's held-out split, encoded by the reference."""
        prompts = standins.prompts("heldout", self.subject)[:SAMPLES]
        positive = self.reference.encode(prompts)
        is_guided = self.reference.bundle.export.guidance.is_classifier_free
        negative = self.reference.encode([""]) if is_guided else None
        shape = self.reference.resolution().noise_shape
        return tuple(
            Request(philox_normal(seed, shape)[None], positive.select(seed), negative)
            for seed in range(len(prompts))
        )

    @cached_property
    def expected(self) -> Batch:
        """What the reference makes of the first request."""
        return self.render(self.reference.session(self.schedule), self.requests[:1])

    @cached_property
    def found(self) -> Batch:
        """What the pipeline under test makes of the first request, once its loop is captured."""
        return self.replayed(self.session())

    def session(self, *, batch: int = 1, runtime: Runtime | Watched | None = None) -> Session:
        """A new session under test, on a runtime of the same kind."""
        graphs = self.tested.graphs
        if runtime is not None:
            graphs = Graphs(self.tested.bundle, runtime)
        return Session(graphs, self.schedule, self.tested.resolution(), batch=batch)

    def replayed(self, session: Session) -> Batch:
        """The first request by the third run: plain calls, then a capture, then its replay."""
        batches = [self.render(session, self.requests[:1]) for _ in range(3)]
        return batches[-1]

    def render(
        self,
        session: Session,
        requests: Sequence[Request],
        on_evaluation: OnEvaluation | None = None,
    ) -> Batch:
        """Run a session of as many pictures as there are requests."""
        noise = np.concatenate([request.noise for request in requests])
        tensors = conditioning_of(requests).tensors
        return session.run(noise, tensors, self.scale, on_evaluation)


def conditioning_of(requests: Sequence[Request]) -> Conditioning:
    """The prompts of a batch and then, where there are any, its negative prompts."""
    parts = [request.positive for request in requests]
    parts += [request.negative for request in requests if request.negative is not None]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.followed_by(part)
    return joined


def _placed(check: Check, backend: str, subject: str) -> Check:
    """The check with its backend and subject, where it does not name others itself."""
    return msgspec.structs.replace(
        check, backend=check.backend or backend, subject=check.subject or subject
    )


def gpu_backends(driver: Driver) -> tuple[list[str], list[Check]]:
    """The backends that run on the first GPU here, and a skipped check for each other one."""
    libraries = survey(FLAVOURS)
    present, absent = [], []
    for state in available_backends(driver):
        if state.name == REFERENCE:
            continue
        verdict = Verdict(is_usable=state.is_available, why=state.state)
        if verdict.is_usable and state.name in libraries:
            verdict = builds_for(libraries[state.name], driver.gpus[0])
        if verdict.is_usable:
            present.append(state.name)
        else:
            why = record.skipped("backend", verdict.why)
            absent.append(msgspec.structs.replace(why, backend=state.name))
    return present, absent


def _ranges(bundle: Bundle) -> list[str]:
    """Options of `plan` that make room for the smallest tiles: one position of a latent a side."""
    export = bundle.export
    axes = export.tiling.space if export.tiling else ()
    sides = zip(("height", "width"), axes, strict=False)
    return [
        text
        for name, axis in sides
        for size in [getattr(export.resolution, name)]
        for text in (f"--{name}", f"{axis.samples}/{size}/{size}")
    ]


def build_plans(bundle: Bundle, flavour: str, *options: str) -> None:
    """Have `meancache-trt plan` build what is missing, in a process of its own.

    Raises `PlanError` with its words where it fails.
    """
    command = [sys.executable, "-m", "meancache_trt.cli", "plan", str(bundle.directory)]
    done = subprocess.run(
        [*command, "--backend", flavour, *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise PlanError(f"`meancache-trt plan` failed: {words[-1]}")


def _say(message: str) -> None:
    print(message, file=sys.stderr)
