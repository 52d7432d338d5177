"""What a user asks to evaluate, and how a bundle or a diffusers pipeline answers it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from meancache_trt import standins
from meancache_trt.build import default_prompts, picture_size, recordings_beside
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.evaluation import Evaluation, edge_cost_map
from meancache_trt.calibration.trajectories import (
    MANIFEST as RECORDINGS,
)
from meancache_trt.calibration.trajectories import (
    Prompt,
    Trajectories,
    load_trajectories,
)
from meancache_trt.engine_field import engine_field
from meancache_trt.errors import InputError, MeanCacheError
from meancache_trt.evaluate.competitors import (
    Bakery,
    Competitor,
    chosen_methods,
    of_bundle,
    of_schedules,
    steps_of,
)
from meancache_trt.evaluate.measure import Plan, check_unseen, measure
from meancache_trt.evaluate.pictures import PictureStore
from meancache_trt.evaluate.renderer import EngineRenderer, Renderer, other_precisions
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.pipeline import identify
from meancache_trt.export.text import TextPrecision
from meancache_trt.manifest import Resolution
from meancache_trt.meancache.schedule import load_schedule
from meancache_trt.record import Note, Recorder, RecordOptions, Report
from meancache_trt.render import Pipeline
from meancache_trt.rendering import NoiseSource

SAMPLES = 32
"""Pictures by default: the standard error of a mean PSNR is then a fifth of its spread."""

SEED = 1000
"""The first seed by default, away from those of calibration, which begin at 0."""

DEFAULT_BUDGETS = (6, 10, 15)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is evaluated, apart from the subject.

    Either `schedules`, names in the bundle or files, or `methods` at `budgets`, baked from the
    recordings in `calibration`; with neither, a bundle's calibrated schedules, or all methods of a
    pipeline. `texts` None are a stand-in's evaluation prompts, or the packaged ones that were not
    calibrated on; `samples` None is one picture a text that was given, or else `SAMPLES`. Picture i
    has seed `seed` + i. `steps`, `calibration_samples` and `text_tokens` are for a pipeline, whose
    recordings are made where they are missing; `backend`, `batch`, `noise` and those of the text
    encoders for a bundle.
    """

    schedules: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    calibration: Path | None = None
    calibration_samples: int = 16
    texts: tuple[str, ...] | None = None
    samples: int | None = None
    seed: int = SEED
    steps: int = 50
    reference_steps: int | None = None
    against: str | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    noise: NoiseSource = "philox"
    batch: int = 1
    backend: str = "auto"
    threads: int = 0
    embedding_cache: str | None = None
    text_precision: TextPrecision = "float32"

    def __post_init__(self) -> None:
        if self.schedules and (self.methods or self.budgets):
            raise InputError(
                "schedules are evaluated as they are, methods are baked at budgets; give "
                "--schedules, or --methods and --budgets"
            )

        chosen_methods(self.methods)

    @property
    def is_baked(self) -> bool:
        """Whether methods are named."""
        return bool(self.methods or self.budgets)

    @property
    def baked(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The methods and budgets to bake."""
        return self.methods or ("all",), self.budgets or DEFAULT_BUDGETS


def evaluate_bundle(
    bundle: Bundle,
    request: Request,
    directory: Path,
    *,
    pictures: PictureStore | None,
    note: Note,
    report: Report,
) -> Evaluation:
    """Evaluate on a bundle's engine; see `measure` for what `directory` will hold.

    Raises:
        InputError: for prompts that were calibrated on, and other input that cannot be used.
        MeanCacheError: what rendering, baking and the metrics raise.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_pipeline(bundle, request))
        embeddings = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        size = opened.resolution(request.height, request.width, request.frames)
        recorded = _recorded(bundle, request, size)
        scale = request.guidance_scale
        if scale is None and recorded is not None:
            scale = recorded.settings.guidance_scale
        renderer = _engine(opened, request, size, embeddings, scale)
        if request.is_baked:
            assert recorded is not None
            field = engine_field(opened, recorded)
            bakery = stack.enter_context(Bakery(recorded, lambda: stack.enter_context(field)))
            competitors = bakery.competitors(*request.baked)
            steps = recorded.grid.steps
        else:
            competitors = of_bundle(bundle, request.schedules, size.size)
            steps = steps_of([each.make() for each in competitors])
        rounded = [
            _engine(
                stack.enter_context(_pipeline(bundle, request, precision)),
                request,
                size,
                embeddings,
                scale,
            )
            for precision in other_precisions(
                bundle, opened.graphs.network("transformer").precision
            )
        ]
        texts = request.texts or _unseen_texts(_standin(bundle.export.model.digest), recorded)
        plan = _plan(request, texts, recorded, steps, rounded)
        return measure(
            renderer, competitors, plan, directory, pictures=pictures, note=note, report=report
        )


def evaluate_pipeline(
    checkpoint: Checkpoint,
    request: Request,
    directory: Path,
    *,
    pictures: PictureStore | None,
    note: Note,
    report: Report,
) -> Evaluation:
    """Evaluate a diffusers pipeline with our scheduler; needs torch, and no engine.

    What it is calibrated with is recorded first, in `request.calibration` or
    `directory`/calibration, and resumed where it was begun. Raises as `evaluate_bundle`.
    """
    from meancache_trt.evaluate.torch_renderer import (  # noqa: PLC0415  (imports torch)
        TorchRenderer,
        limited_threads,
    )

    recorder = Recorder(checkpoint, _record_options(checkpoint, request))
    with contextlib.ExitStack() as stack:
        stack.enter_context(limited_threads(request.threads))
        renderer = TorchRenderer(checkpoint, recorder.pipeline, recorder.call)
        recorded = None
        if request.schedules:
            competitors = _of_files(request.schedules)
            steps = steps_of([each.make() for each in competitors])
        else:
            folder = request.calibration or directory / "calibration"
            recorded = known = recorder.record(folder, note=note, report=report)
            bakery = stack.enter_context(Bakery(known, lambda: recorder.field(known)))
            competitors = bakery.competitors(*request.baked)
            steps = recorded.grid.steps
        texts = request.texts or _unseen_texts(_standin(identify(checkpoint).digest), recorded)
        plan = _plan(request, texts, recorded, steps, [])
        return measure(
            renderer, competitors, plan, directory, pictures=pictures, note=note, report=report
        )


def _of_files(names: Sequence[str]) -> list[Competitor]:
    for name in names:
        if Path(name).suffix != ".json":
            raise InputError(
                f"a pipeline has no schedules of its own, found {name!r}; give schedule files, or "
                "--methods"
            )
    return of_schedules([load_schedule(name) for name in names])


def _record_options(checkpoint: Checkpoint, request: Request) -> RecordOptions:
    return RecordOptions(
        size=picture_size(checkpoint, request.height, request.width),
        frames=request.frames,
        prompts=default_prompts(checkpoint),
        steps=request.steps,
        samples=request.calibration_samples,
        guidance_scale=request.guidance_scale,
        budgets=request.budgets or DEFAULT_BUDGETS,
    )


def _pipeline(bundle: Bundle, request: Request, precision: str | None = None) -> Pipeline:
    return Pipeline(
        bundle,
        backend=request.backend,
        threads=request.threads,
        precision=precision,
        embedding_cache=request.embedding_cache,
        text_precision=request.text_precision,
    )


def _engine(
    pipeline: Pipeline,
    request: Request,
    size: Resolution,
    embeddings: Path,
    guidance_scale: float | None,
) -> EngineRenderer:
    return EngineRenderer(
        pipeline,
        size,
        embeddings,
        guidance_scale=guidance_scale,
        batch=request.batch,
        noise=request.noise,
        threads=request.threads,
    )


def _recorded(bundle: Bundle, request: Request, size: Resolution) -> Trajectories | None:
    """What the bundle was calibrated with, if it is still there; needed where methods are baked."""
    folder = request.calibration or recordings_beside(bundle, size.size)
    if request.calibration or (folder / RECORDINGS).exists():
        return load_trajectories(folder)
    if request.is_baked:
        raise InputError(
            f"methods are baked from recordings, expected some in {folder}, found none; record "
            f"them with `meancache-trt calibrate MODEL -o {folder}`, or give --calibration"
        )
    return None


def _plan(
    request: Request,
    texts: Sequence[str],
    recorded: Trajectories | None,
    steps: int,
    rounded: Sequence[Renderer],
) -> Plan:
    count = request.samples or (len(texts) if request.texts else SAMPLES)
    prompts = tuple(Prompt(texts[i % len(texts)], seed=request.seed + i) for i in range(count))
    if recorded is None:
        notes: tuple[str, ...] = (
            "whether the prompts were calibrated on is not known: the recordings are not here",
        )
    else:
        notes = check_unseen(prompts, recorded)
    return Plan(
        prompts=prompts,
        steps=steps,
        reference_steps=request.reference_steps,
        against=request.against,
        rounded=rounded,
        edge_costs=None if recorded is None else edge_cost_map(recorded),
        notes=notes,
    )


def _unseen_texts(standin: str | None, recorded: Trajectories | None) -> list[str]:
    """A stand-in's evaluation prompts; else the packaged ones, without those calibrated on."""
    if standin is not None:
        return standins.prompts("evaluation", standin)
    text = resources.files("meancache_trt").joinpath("prompts.txt").read_text(encoding="utf-8")
    packaged = [line for line in text.splitlines() if line]
    seen = {sample.prompt.text for sample in recorded.samples} if recorded else set()
    return [line for line in packaged if line not in seen] or packaged


def _standin(digest: str) -> str | None:
    """The stand-in whose transformer has this digest."""
    for name in standins.names():
        with contextlib.suppress(MeanCacheError):
            if identify(Checkpoint(standins.path(name))).digest == digest:
                return name
    return None
