"""From a checkpoint to a bundle: export, record, bake. Finished stages are not done again."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from meancache_trt import standins
from meancache_trt.bundle import MANIFEST, Bundle, create_bundle
from meancache_trt.calibration.baking import BakeOptions, bake_for_goal, bake_schedules
from meancache_trt.calibration.target import Goal
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.engine_field import engine_field
from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint, resolve_checkpoint
from meancache_trt.export.job import PIPELINE_FOLDER
from meancache_trt.export.lora import Lora
from meancache_trt.export.pipeline import export_components, identify, resolutions_of
from meancache_trt.export.registry import detect
from meancache_trt.manifest import Exported, Model, component_name
from meancache_trt.meancache.hashing import verified_sha256
from meancache_trt.meancache.schedule import FITTED, Schedule, bake
from meancache_trt.record import Note, Recorder, RecordOptions, Report
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


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported.

    `size` is (height, width) in pixels; `frames` of a video and `text_tokens` None mean what the
    family's pipeline takes. `further_sizes` are listed in the bundle besides. `batch` is what plans
    are meant for; None means one picture, or what a bundle that is there says. `precisions` are
    explained at `export_components`, as are `parity_bytes` and `guidance_scale_2`.
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
    guidance_scale_2: float | None = None

    @property
    def sizes(self) -> tuple[PictureSize, ...]:
        """Every size, the first of which is a new bundle's default."""
        return (PictureSize(*self.size, self.frames), *self.further_sizes)


def find_model(model: str, loras: Sequence[str] = ()) -> Checkpoint:
    """The checkpoint that a user means: a diffusers folder, a hub id, or `standin/NAME`.

    `loras` are merged into it, in order: each FILE or FILE:SCALE, or `standin/NAME` likewise.

    Raises `ExportError` where there is no such checkpoint, `InputError` where a LoRA is none.
    """
    found = tuple(map(_find_lora, loras))
    if model.startswith(STANDIN) and not Path(model).exists():
        return Checkpoint(standins.path(model.removeprefix(STANDIN)), found)
    return Checkpoint(resolve_checkpoint(model), found)


def _find_lora(text: str) -> Lora:
    if not text.startswith(STANDIN) or Path(text).exists():
        return Lora.parse(text)
    name, colon, scale = text.removeprefix(STANDIN).partition(":")
    return Lora.parse(f"{standins.lora_path(name)}{colon}{scale}")


def picture_size(checkpoint: Checkpoint, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, each by default what the model was trained at."""
    side = detect(checkpoint.path).default_side(checkpoint.configs(("transformer", "vae")))
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
            guidance_scale_2=options.guidance_scale_2,
            loras=checkpoint.loras,
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
    other = (
        _other_model(there.model, identify(checkpoint))
        or _other_file(bundle, checkpoint)
        or _other_stage(there, options.guidance_scale_2)
    )
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


def _other_stage(there: Exported, guidance_scale_2: float | None) -> str | None:
    if guidance_scale_2 in (None, there.second_guidance_scale):
        return None
    return f"second stage {there.second_stage} against a guidance scale of {guidance_scale_2:g}"


def record_pipeline(
    checkpoint: Checkpoint,
    directory: Path,
    options: RecordOptions,
    *,
    note: Note,
    report: Report,
    is_forced: bool = False,
) -> Trajectories:
    """See `Recorder.record`."""
    recorder = Recorder(checkpoint, options)
    return recorder.record(directory, note=note, report=report, is_forced=is_forced)


Wanted = Sequence[int] | Goal
"""What is baked for: budgets, or a quality."""


def bake_wanted(
    trajectories: Trajectories,
    wanted: Wanted,
    options: BakeOptions | None = None,
    network: VelocityField | None = None,
    *,
    note: Note = lambda _: None,
) -> tuple[Schedule, ...]:
    """`bake_schedules`, or the one that `bake_for_goal` finds; then all that was tried is noted."""
    if not isinstance(wanted, Goal):
        return bake_schedules(trajectories, wanted, options, network)
    found, tried = bake_for_goal(trajectories, wanted, options, network)
    for schedule in tried:
        note(_attempt(schedule, wanted))
    return (found,)


def _attempt(schedule: Schedule, goal: Goal) -> str:
    evidence = schedule.calibration
    assert evidence is not None
    assert evidence.target is not None
    fidelity, sure = evidence.fidelity, evidence.target.confidence
    if fidelity is None:
        return f"{schedule.budget} evaluations: every step"
    return (
        f"{schedule.budget} evaluations: {fidelity.psnr.mean:.1f} dB, 5th percentile "
        f"{fidelity.psnr.p5:.1f} dB; {goal.describe()} with probability {sure:.2f}"
    )


def bake_for(
    bundle: Bundle,
    trajectories: Trajectories,
    wanted: Wanted,
    options: BakeOptions | None = None,
    *,
    backend: str = "auto",
    threads: int = 0,
    note: Note = lambda _: None,
) -> tuple[Schedule, ...]:
    """`bake_wanted` with the bundle's engine, so that schedules say how close pictures come.

    Raises `RuntimeUnavailableError` where the backend cannot run here.
    """
    with (
        Pipeline(bundle, backend=backend, threads=threads) as pipeline,
        engine_field(pipeline, trajectories) as field,
    ):
        return bake_wanted(trajectories, wanted, options, field, note=note)


def bake_into(
    bundle: Bundle,
    trajectories: Trajectories,
    wanted: Wanted,
    options: BakeOptions | None = None,
    *,
    backend: str = "auto",
    threads: int = 0,
    note: Note = lambda _: None,
) -> list[Schedule]:
    """Add to `bundle` a schedule for each budget, and `full`, which evaluates every step.

    A schedule is called bN after its budget, or bN-WIDTHxHEIGHT where it is calibrated for a
    resolution other than the bundle's default. `full` is the same for every resolution. What is
    worse than Euler is noted. For the other arguments see `bake_for`.
    """
    settings = trajectories.settings
    full = bake(
        "euler",
        settings.grid,
        range(settings.grid.steps),
        name="full",
        family=settings.family,
    )
    baked = bake_for(
        bundle, trajectories, wanted, options, backend=backend, threads=threads, note=note
    )
    chosen = [named_in(bundle, schedule, f"b{schedule.budget}") for schedule in baked]
    is_default = not _suffix(bundle, grid_size(settings.grid))
    if is_default or full.name not in bundle.schedule_names():
        bundle.add_schedule(full)
    for schedule in chosen:
        bundle.add_schedule(schedule)
        warn_of(schedule, note)
    return chosen


def warn_of(schedule: Schedule, note: Note) -> None:
    """Note a schedule that is worse than Euler on its own nodes."""
    evidence = schedule.calibration
    if evidence is None or not evidence.is_worse_than_euler:
        return
    assert evidence.fidelity is not None
    assert evidence.euler is not None
    is_fitted = schedule.method == FITTED
    remedy = "record more samples, or raise the budget" if is_fitted else "use --method fitted"
    note(
        f"warning: schedule {schedule.name} ({schedule.method}) is worse than Euler on the same "
        f"nodes, {evidence.fidelity.psnr.mean:.1f} against {evidence.euler.psnr.mean:.1f} dB on "
        f"average; {remedy}"
    )


def named_in(bundle: Bundle, schedule: Schedule, name: str | None = None) -> Schedule:
    """The schedule, called `name` (or its own) and the resolution that it is calibrated for.

    The resolution is left out where it is the bundle's default, or there is none.
    """
    suffix = _suffix(bundle, calibrated_size(schedule))
    return msgspec.structs.replace(schedule, name=f"{name or schedule.name}{suffix}")


def calibration_directory(bundle: Bundle, checkpoint: Checkpoint, options: ExportOptions) -> Path:
    """Where `build` records the first of the sizes, beside the bundle; each has a place."""
    first, *_ = resolutions_of(checkpoint, options.sizes, bundle.export.text_tokens)
    return recordings_beside(bundle, first.size)


def recordings_beside(bundle: Bundle, size: PictureSize) -> Path:
    """Where `build` records what a bundle is calibrated with at one of its sizes."""
    suffix = _suffix(bundle, size)
    return bundle.directory.with_name(f"{bundle.directory.name}.calibration{suffix}")


def _suffix(bundle: Bundle, size: PictureSize | None) -> str:
    return "" if size in (None, bundle.export.resolution.size) else f"-{size}"


def default_prompts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Calibration prompts: a stand-in's own, otherwise a packaged list of everyday subjects."""
    if checkpoint.path.parent == Path(standins.__file__).parent:
        return tuple(standins.prompts("calibration", checkpoint.path.name))
    text = resources.files("meancache_trt").joinpath("prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def _tool_versions() -> dict[str, str]:
    versions = {}
    for package in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
