"""From a checkpoint to a bundle: export, record, bake. Finished stages are not done again."""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from meancache_trt import standins
from meancache_trt.bundle import MANIFEST, Bundle, create_bundle
from meancache_trt.calibration.baking import BakeOptions, bake_schedules
from meancache_trt.calibration.trajectories import Prompt, Trajectories, record
from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint, resolve_checkpoint
from meancache_trt.export.family import Configs, Family, default_frames
from meancache_trt.export.pipeline import export_components, identify
from meancache_trt.export.registry import detect
from meancache_trt.manifest import Exported
from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.schedule import ModelReference, Schedule, bake
from meancache_trt.render import Pipeline

STANDIN = "standin/"
"""`standin/flux` as a model means the small trained one that comes with the package."""

DEFAULT_BUDGETS = (15, 10)
"""The two budgets that the paper reports for FLUX.1."""

_TOOLS = ("meancache-trt", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")

Note = Callable[[str], None]
Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported.

    `frames` of a video and `text_tokens` None mean what the family's pipeline takes.
    """

    height: int
    width: int
    frames: int | None = None
    text_tokens: int | None = None
    weights: Literal["link", "copy"] = "link"
    is_parity_checked: bool = True


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What is recorded for calibration.

    `guidance_scale` None means the model's default, and so do `frames` of a video. Sample i has
    prompt i (they repeat where there are fewer than `samples`) and seed i.
    """

    height: int
    width: int
    frames: int | None = None
    prompts: tuple[str, ...]
    steps: int = 50
    samples: int = 16
    guidance_scale: float | None = None


class PlanRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a runtime prepared here: load time by graph, one evaluation with its update."""

    runtime: str
    version: str
    threads: int
    load_ms: dict[str, float]
    evaluation_ms: float


def find_model(model: str) -> Checkpoint:
    """The checkpoint that a user means: a diffusers folder, a hub id, or `standin/NAME`.

    Raises `ExportError` where there is none.
    """
    if model.startswith(STANDIN) and not Path(model).exists():
        return Checkpoint(standins.path(model.removeprefix(STANDIN)))
    return Checkpoint(resolve_checkpoint(model))


def picture_size(checkpoint: Checkpoint, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, each by default what the model was trained at."""
    side = detect(checkpoint.path).default_side(checkpoint.configs(("vae",)))
    return height or side, width or side


def export(
    checkpoint: Checkpoint, output: Path, options: ExportOptions, *, note: Note, is_forced: bool
) -> Bundle:
    """Export into a new bundle, unless the one at `output` is already what this would give.

    Raises:
        ExportError: for a checkpoint that cannot be exported, or failed parity.
        InputError: where `output` holds another bundle and `is_forced` is off.
    """
    if (output / MANIFEST).is_file() and not is_forced:
        bundle = Bundle.open(output)
        difference = _difference(bundle, checkpoint, options)
        if difference is None:
            note(f"export: {output} is already there")
            return bundle
        raise InputError(
            f"{output} is a bundle of something else: {difference}; give another output path, or "
            "--force to replace it"
        )

    def fill(directory: Path) -> Exported:
        return export_components(
            checkpoint.path,
            directory,
            height=options.height,
            width=options.width,
            frames=options.frames,
            text_tokens=options.text_tokens,
            weights=options.weights,
            check_parity=options.is_parity_checked,
            report=lambda stage: note(f"export: {stage}"),
        )

    return create_bundle(output, fill, _tool_versions())


def _difference(bundle: Bundle, checkpoint: Checkpoint, options: ExportOptions) -> str | None:
    there = bundle.export
    size = there.resolution
    if (size.height, size.width) != (options.height, options.width):
        return f"{size.width}x{size.height} against {options.width}x{options.height}"
    if options.frames not in (None, size.frames):
        return f"{size.frames} frames against {options.frames}"
    if options.text_tokens not in (None, there.text_tokens):
        return f"{there.text_tokens} text tokens against {options.text_tokens}"
    model = identify(checkpoint)
    if model.digest != there.model.digest:
        return (
            f"checkpoint {there.model.name} ({there.model.digest[:12]}) against {model.name} "
            f"({model.digest[:12]})"
        )
    return None


def record_pipeline(
    checkpoint: Checkpoint, directory: Path, options: RecordOptions, *, note: Note, report: Report
) -> Trajectories:
    """Run the checkpoint's diffusers pipeline over all steps and record it, resuming if begun.

    The pipeline runs in float32 on the CPU. Raises `CalibrationError` where `directory` was
    recorded with other settings or a velocity is not finite.
    """
    from meancache_trt.calibration.recording import (  # noqa: PLC0415  (imports torch)
        PipelineCall,
        PipelineSampler,
        load_pipeline,
    )

    family = detect(checkpoint.path)
    configs = checkpoint.configs(("transformer", "vae", "scheduler", *family.text_components))
    scale = options.guidance_scale
    call = PipelineCall(
        steps=options.steps,
        height=options.height,
        width=options.width,
        frames=default_frames(family, configs) if options.frames is None else options.frames,
        guidance_scale=family.guidance(configs).default_scale if scale is None else scale,
        guidance_argument=family.guidance_argument,
        options=_call_options(family, configs),
    )
    prompts = [
        Prompt(options.prompts[index % len(options.prompts)], seed=index)
        for index in range(options.samples)
    ]
    note(f"calibrate: recording {len(prompts)} samples of {options.steps} steps")
    sampler = PipelineSampler(load_pipeline(checkpoint.path), call)
    model = identify(checkpoint)
    settings = sampler.settings(
        prompts[0],
        family=family.name,
        model=ModelReference(name=model.name, digest=model.digest),
    )
    return record(directory, settings, sampler, prompts, report)


def _call_options(family: Family, configs: Configs) -> dict[str, str | int]:
    """Further arguments, with which the diffusers pipeline does what a render does by default."""
    options: dict[str, str | int] = {}
    if family.text_tokens_argument:
        options[family.text_tokens_argument] = family.default_text_tokens(configs)
    if family.guidance(configs).is_classifier_free:
        options["negative_prompt"] = ""  # given none, diffusers leaves guidance out
    return options


def bake_into(
    bundle: Bundle,
    trajectories: Trajectories,
    budgets: Sequence[int],
    options: BakeOptions | None = None,
) -> list[Schedule]:
    """Add to `bundle` a schedule for each budget, and `full`, which evaluates every step.

    A schedule is called bN after its budget.
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
        msgspec.structs.replace(schedule, name=f"b{schedule.budget}")
        for schedule in bake_schedules(trajectories, budgets, options)
    ]
    for schedule in (full, *chosen):
        bundle.add_schedule(schedule)
    return chosen


def plan(bundle: Bundle, *, backend: str, threads: int) -> PlanRecord:
    """Load every graph on a backend, measure an evaluation, and record both in the bundle.

    Raises `RuntimeUnavailableError` where the backend cannot run here.
    """
    with Pipeline(bundle, backend=backend, threads=threads) as pipeline:
        load_ms = {}
        for name, component in bundle.export.components.items():
            start = time.perf_counter()
            pipeline.graphs.graph(component)
            load_ms[name] = 1e3 * (time.perf_counter() - start)
        schedule = pipeline.schedule(None, pipeline.guidance(None))
        loop = pipeline.session(schedule).loop
        loop.run()  # the first run allocates
        start = time.perf_counter()
        loop.run()
        pipeline.runtime.synchronize()
        record = PlanRecord(
            runtime=pipeline.runtime.name,
            version=pipeline.runtime.version,
            threads=threads,
            load_ms=load_ms,
            evaluation_ms=1e3 * (time.perf_counter() - start) / schedule.budget,
        )
    bundle.add_file(f"plans/{record.runtime}.json", encode_json(record))
    return record


def default_prompts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Calibration prompts: a stand-in's own, otherwise a packaged list of everyday subjects."""
    if checkpoint.path.parent == Path(standins.__file__).parent:
        return tuple(standins.prompts("calibration"))
    text = resources.files("meancache_trt").joinpath("prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def _tool_versions() -> dict[str, str]:
    versions = {}
    for package in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
