"""From a checkpoint to a bundle: export, record, bake. Finished stages are not done again."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from meancache_trt import standins
from meancache_trt.bundle import MANIFEST, Bundle, create_bundle
from meancache_trt.calibration.baking import BakeOptions, bake_schedules, check_budgets
from meancache_trt.calibration.trajectories import Prompt, Trajectories, discard, record
from meancache_trt.engine_field import engine_field
from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint, resolve_checkpoint
from meancache_trt.export.family import Configs, Family, default_frames
from meancache_trt.export.job import PIPELINE_FOLDER
from meancache_trt.export.pipeline import export_components, identify, resolutions_of
from meancache_trt.export.registry import detect
from meancache_trt.manifest import Exported, Model, component_name
from meancache_trt.meancache.hashing import verified_sha256
from meancache_trt.meancache.schedule import (
    FITTED,
    ModelReference,
    Schedule,
    bake,
    check_guidance_scale,
)
from meancache_trt.render import Pipeline
from meancache_trt.selection import calibrated_size, grid_size
from meancache_trt.shapes import ONE, PictureSize, Range

STANDIN = "standin/"
"""`standin/flux` as a model means the small trained one of FLUX that comes with the package."""

DEFAULT_BUDGETS = (15, 10)
"""The two budgets that the paper reports for FLUX.1."""

_TOOLS = (
    "meancache-trt",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "onnx",
    "onnxscript",
    "onnxruntime",
)

Note = Callable[[str], None]
Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported.

    `size` is (height, width) in pixels; `frames` of a video and `text_tokens` None mean what the
    family's pipeline takes. `further_sizes` are listed in the bundle besides. `batch` is what plans
    are meant for; None means one picture, or what a bundle that is there says. `precisions` are
    explained at `export_components`, as is `parity_bytes`.
    """

    size: tuple[int, int]
    frames: int | None = None
    further_sizes: tuple[PictureSize, ...] = ()
    batch: Range | None = None
    text_tokens: int | None = None
    weights: Literal["link", "copy"] = "link"
    precisions: tuple[str, ...] | None = None
    is_parity_checked: bool = True
    parity_bytes: int | None = None

    @property
    def sizes(self) -> tuple[PictureSize, ...]:
        """Every size, the first of which is a new bundle's default."""
        return (PictureSize(*self.size, self.frames), *self.further_sizes)


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What is recorded for calibration, at `size` (height, width) in pixels.

    `guidance_scale`, `text_tokens` and `frames` of a video None mean the model's defaults. Sample i
    has prompt i (they repeat where there are fewer than `samples`) and seed i. `budgets` are what
    will be baked from it, so that one out of range is refused before the work.
    """

    size: tuple[int, int]
    frames: int | None = None
    prompts: tuple[str, ...]
    steps: int = 50
    samples: int = 16
    guidance_scale: float | None = None
    text_tokens: int | None = None
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 1:
            raise InputError(
                f"calibration records at least one sample of one step, found {self.samples} of "
                f"{self.steps}; give --samples and --steps of 1 or more"
            )
        check_guidance_scale(self.guidance_scale)
        check_budgets(self.budgets, self.steps)


def find_model(model: str) -> Checkpoint:
    """The checkpoint that a user means: a diffusers folder, a hub id, or `standin/NAME`.

    Raises `ExportError` where there is none.
    """
    if model.startswith(STANDIN) and not Path(model).exists():
        return Checkpoint(standins.path(model.removeprefix(STANDIN)))
    return Checkpoint(resolve_checkpoint(model))


def picture_size(checkpoint: Checkpoint, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, each by default what the model was trained at."""
    if _is_standin(checkpoint):
        side = standins.SIDE_PX  # not every VAE's configuration says it
    else:
        side = detect(checkpoint.path).default_side(checkpoint.configs(("vae",)))
    return height or side, width or side


def export(
    checkpoint: Checkpoint, output: Path, options: ExportOptions, *, note: Note, is_forced: bool
) -> Bundle:
    """Export into a new bundle, or add what the one at `output` does not list.

    To a bundle of the same checkpoint, resolutions are added as entries of its manifest, and the
    batch is changed there; graphs, schedules and `bundle_id` stay. What changes a graph, its check
    or what it is fed stays an error: another checkpoint, another text length, weights copied where
    they are linked, a comparison with diffusers where there was none.

    Raises:
        ExportError: for a checkpoint that cannot be exported, or failed parity.
        InputError: for a size that the family cannot take, before anything is done, and where
            `output` holds another bundle and `is_forced` is off.
    """
    if (output / MANIFEST).is_file() and not is_forced:
        return _extended(Bundle.open(output), checkpoint, options, note)

    def fill(directory: Path) -> Exported:
        return export_components(
            checkpoint.path,
            directory,
            height=options.size[0],
            width=options.size[1],
            frames=options.frames,
            further_sizes=options.further_sizes,
            batch=options.batch or ONE,
            text_tokens=options.text_tokens,
            weights=options.weights,
            precisions=options.precisions,
            check_parity=options.is_parity_checked,
            parity_bytes=options.parity_bytes,
            report=lambda stage: note(f"export: {stage}"),
        )

    return create_bundle(output, fill, _tool_versions())


def _extended(bundle: Bundle, checkpoint: Checkpoint, options: ExportOptions, note: Note) -> Bundle:
    """The bundle with what `options` ask for besides, all of it or nothing."""
    before = bundle.export
    difference = _difference(bundle, checkpoint, options)
    if difference is not None:
        raise InputError(
            f"{bundle.directory} is a bundle of something else: {difference}; give another output "
            "path, or --force to replace it"
        )
    wanted = resolutions_of(checkpoint, options.sizes, before.text_tokens)
    added = bundle.extend(wanted, options.batch)
    if added:
        note(
            f"export: added {', '.join(str(resolution.size) for resolution in added)} to "
            f"{bundle.directory}, whose graphs serve every resolution and stay as they are"
        )
    if bundle.export.batch != before.batch:
        note(f"export: {bundle.directory} is now meant for batches of {bundle.export.batch}")
    if not added and bundle.export.batch == before.batch:
        note(f"export: {bundle.directory} is already there")
    return bundle


def _difference(bundle: Bundle, checkpoint: Checkpoint, options: ExportOptions) -> str | None:
    """What sets the bundle apart from one that can be had by adding to it, or None."""
    there = bundle.export
    other = _other_model(there.model, identify(checkpoint)) or _other_file(bundle, checkpoint)
    if other is not None:
        return other
    if options.text_tokens not in (None, there.text_tokens):
        return f"{there.text_tokens} text tokens against {options.text_tokens}"
    if options.weights == "copy" and any(file.is_linked for file in there.weight_files()):
        return "linked weights against copied ones"
    for precision in options.precisions or ():
        if component_name("transformer", precision) not in there.components:
            return f"no {precision} graphs against some"
    if options.is_parity_checked and not there.parity:
        return "graphs that were not compared with diffusers"
    return None


def _other_model(there: Model, model: Model) -> str | None:
    if model.digest == there.digest:
        return None
    return (
        f"checkpoint {there.name} ({there.digest[:12]}) against {model.name} ({model.digest[:12]})"
    )


def _other_file(bundle: Bundle, checkpoint: Checkpoint) -> str | None:
    """A file beside the transformer's that is not the checkpoint's: VAE, encoders, scheduler."""
    origins = {PIPELINE_FOLDER: checkpoint.path, "vae_decoder": checkpoint.path / "vae"}
    for path, listed in bundle.manifest.files.items():
        folder, *rest = PurePosixPath(path).parts
        source = origins.get(folder, bundle.directory / "none").joinpath(*rest)
        if source.is_file() and verified_sha256(source) != listed.sha256:
            return f"{path} against the checkpoint's"
    return None


def record_pipeline(
    checkpoint: Checkpoint,
    directory: Path,
    options: RecordOptions,
    *,
    note: Note,
    report: Report,
    is_forced: bool = False,
) -> Trajectories:
    """Run the checkpoint's diffusers pipeline over all steps and record it, resuming if begun.

    `is_forced` drops what was recorded in `directory` before. The pipeline runs in float32 on the
    CPU. Raises `CalibrationError` where `directory` was recorded with other settings or a velocity
    is not finite.
    """
    from meancache_trt.calibration.recording import (  # noqa: PLC0415  (imports torch)
        PipelineCall,
        PipelineSampler,
        load_pipeline,
    )

    family = detect(checkpoint.path)
    configs = checkpoint.configs(("transformer", "vae", "scheduler", *family.text_components))
    scale = options.guidance_scale
    text_tokens = options.text_tokens or family.default_text_tokens(configs)
    call = PipelineCall(
        steps=options.steps,
        height=options.size[0],
        width=options.size[1],
        frames=default_frames(family, configs) if options.frames is None else options.frames,
        guidance_scale=family.guidance(configs).default_scale if scale is None else scale,
        guidance_argument=family.guidance_argument,
        options=_call_options(family, configs, text_tokens),
    )
    prompts = [
        Prompt(options.prompts[index % len(options.prompts)], seed=index)
        for index in range(options.samples)
    ]
    note(f"calibrate: recording {len(prompts)} samples of {options.steps} steps")
    if is_forced:
        discard(directory)
    sampler = PipelineSampler(load_pipeline(checkpoint.path), call)
    model = identify(checkpoint)
    settings = sampler.settings(
        prompts[0],
        family=family.name,
        model=ModelReference(name=model.name, digest=model.digest),
        text_tokens=text_tokens,
    )
    return record(directory, settings, sampler, prompts, report)


def _call_options(family: Family, configs: Configs, text_tokens: int) -> dict[str, str | int]:
    """Further arguments, with which the diffusers pipeline does what a render does by default."""
    options: dict[str, str | int] = {}
    if family.text_tokens_argument:
        options[family.text_tokens_argument] = text_tokens
    if family.guidance(configs).is_classifier_free:
        options["negative_prompt"] = ""  # given none, diffusers leaves guidance out
    return options


def bake_for(
    bundle: Bundle,
    trajectories: Trajectories,
    budgets: Sequence[int],
    options: BakeOptions | None = None,
    *,
    backend: str = "auto",
    threads: int = 0,
) -> tuple[Schedule, ...]:
    """`bake_schedules`, with the bundle's engine for methods that run the network.

    Raises `RuntimeUnavailableError` where one does and the backend cannot run here.
    """
    if options is None or options.method != FITTED:
        return bake_schedules(trajectories, budgets, options)
    with (
        Pipeline(bundle, backend=backend, threads=threads) as pipeline,
        engine_field(pipeline, trajectories) as field,
    ):
        return bake_schedules(trajectories, budgets, options, field)


def bake_into(
    bundle: Bundle,
    trajectories: Trajectories,
    budgets: Sequence[int],
    options: BakeOptions | None = None,
    *,
    backend: str = "auto",
    threads: int = 0,
) -> list[Schedule]:
    """Add to `bundle` a schedule for each budget, and `full`, which evaluates every step.

    A schedule is called bN after its budget, or bN-WIDTHxHEIGHT where it is calibrated for a
    resolution other than the bundle's default. `full` is the same for every resolution. For
    `backend` and `threads` see `bake_for`.
    """
    settings = trajectories.settings
    full = bake(
        "euler",
        settings.grid,
        range(settings.grid.steps),
        name="full",
        family=settings.family,
    )
    chosen = [
        named_in(bundle, schedule, f"b{schedule.budget}")
        for schedule in bake_for(
            bundle, trajectories, budgets, options, backend=backend, threads=threads
        )
    ]
    is_default = not _suffix(bundle, grid_size(settings.grid))
    if is_default or full.name not in bundle.schedule_names():
        bundle.add_schedule(full)
    for schedule in chosen:
        bundle.add_schedule(schedule)
    return chosen


def named_in(bundle: Bundle, schedule: Schedule, name: str | None = None) -> Schedule:
    """The schedule, called `name` (or its own) and the resolution that it is calibrated for.

    The resolution is left out where it is the bundle's default, or there is none.
    """
    suffix = _suffix(bundle, calibrated_size(schedule))
    return msgspec.structs.replace(schedule, name=f"{name or schedule.name}{suffix}")


def calibration_directory(bundle: Bundle, checkpoint: Checkpoint, options: ExportOptions) -> Path:
    """Where `build` records the first of the sizes, beside the bundle; each has a place."""
    first, *_ = resolutions_of(checkpoint, options.sizes, bundle.export.text_tokens)
    suffix = _suffix(bundle, first.size)
    return bundle.directory.with_name(f"{bundle.directory.name}.calibration{suffix}")


def _suffix(bundle: Bundle, size: PictureSize | None) -> str:
    return "" if size in (None, bundle.export.resolution.size) else f"-{size}"


def default_prompts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Calibration prompts: a stand-in's own, otherwise a packaged list of everyday subjects."""
    if _is_standin(checkpoint):
        return tuple(standins.prompts("calibration"))
    text = resources.files("meancache_trt").joinpath("prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def _is_standin(checkpoint: Checkpoint) -> bool:
    return checkpoint.path.parent == Path(standins.__file__).parent


def _tool_versions() -> dict[str, str]:
    versions = {}
    for package in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
