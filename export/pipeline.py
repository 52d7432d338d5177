"""A diffusers checkpoint to the graphs, weights and prompt encoders of a bundle."""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from meancache_trt.errors import ExportError, InputError
from meancache_trt.export.checkpoint import Checkpoint, identity, resolve_checkpoint
from meancache_trt.export.family import (
    Configs,
    Family,
    Size,
    check_size,
    default_frames,
    resolution,
    second_stage,
)
from meancache_trt.export.job import (
    F32,
    OVERLAY,
    PIPELINE_FOLDER,
    PRECISIONS,
    Job,
    Precision,
    WeightPlacement,
)
from meancache_trt.export.lora import Lora
from meancache_trt.export.registry import detect
from meancache_trt.manifest import (
    Component,
    Exported,
    Model,
    ParityRecord,
    Resolution,
    WeightFile,
)
from meancache_trt.meancache.hashing import verified_sha256
from meancache_trt.meancache.schedule import TRANSFORMERS
from meancache_trt.shapes import ONE, PictureSize, Range, text_buckets

# Configurations, vocabularies and chat templates
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def export_components(
    checkpoint: Path,
    directory: Path,
    *,
    height: int,
    width: int,
    frames: int | None = None,
    further_sizes: Sequence[PictureSize] = (),
    batch: Range = ONE,
    text_tokens: int | None = None,
    weights: WeightPlacement = "link",
    precisions: Sequence[str] | None = None,
    check_parity: bool = True,
    parity_bytes: int | None = None,
    guidance_scale_2: float | None = None,
    loras: Sequence[Lora] = (),
    report: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a checkpoint's graphs, weights and prompt encoders into `directory`.

    `checkpoint` is a diffusers folder or a hub id; `text_tokens`, and a video's `frames`, are by
    default what the family's pipeline takes. `further_sizes` are listed besides the default size;
    they share its graphs. `batch` is recorded for those who prepare plans. `weights` "link"
    hard-links the checkpoint's files, to another file system by symbolic links, and where there
    are neither copies them; "copy" always copies. Graphs with weights are made in float32, which
    parity is checked in, and in the further `precisions`: by default bfloat16 where the transformer
    is stored so. The export itself does not load the weights; the parity check does, in float32,
    of networks that fit in `parity_bytes` of memory, by default what is free; of others it takes
    the first of each kind of block. What `loras` add up to is merged into a file of the changed
    weights alone, which the graphs point into in the place of the checkpoint's. `guidance_scale_2`
    is what a second transformer is guided by; None means as the first.
    `report` gets a line at each stage.

    Raises `InputError` for a size or a scale that the family cannot take or a LoRA that does not
    fit the checkpoint, and `ExportError` for a checkpoint that is incomplete, damaged or
    unsupported, a graph that fails its checks, or a directory that cannot be written. What was
    written before an error stays in `directory`.
    """
    source, family, configs = _source(checkpoint, loras)
    wanted = [PictureSize(height, width, frames), *further_sizes]
    size, *others = _checked_sizes(family, configs, wanted, text_tokens)
    job = Job(
        source,
        family,
        configs,
        size,
        directory,
        weights,
        report,
        _precisions(source, family, precisions),
        tuple(others),
        parity_bytes,
        second_stage(family, configs, guidance_scale_2),
    )
    try:
        job = _with_overlays(job)
        components = _write_graphs(job)
        encoders = _write_pipeline(job, components)
    except OSError as error:
        raise _unfinished(error, source, directory) from error
    parity = _check_parity(job, components) if check_parity else ()
    return _exported(job, components, encoders, parity, batch)


def _unfinished(error: OSError, source: Checkpoint, directory: Path) -> ExportError:
    place = Path(error.filename2 or error.filename or directory)
    if place.is_relative_to(source.path):
        return ExportError(f"{place} cannot be read: {error.strerror}; download it again")
    return ExportError(
        f"the export cannot write {place}: {error.strerror}; free some space or give another "
        "output path"
    )


def resolutions_of(
    checkpoint: Checkpoint, sizes: Sequence[PictureSize], text_tokens: int
) -> tuple[Resolution, ...]:
    """What a bundle of `checkpoint` records of `sizes`, each once, in order; nothing is written.

    Frames are by default what the family's pipeline makes. Raises `InputError` for a size that the
    family cannot take.
    """
    _, family, configs = _source(checkpoint.path)
    checked = _checked_sizes(family, configs, sizes, text_tokens)
    return tuple(resolution(family, configs, size) for size in checked)


def _checked_sizes(
    family: Family, configs: Configs, sizes: Sequence[PictureSize], text_tokens: int | None
) -> list[Size]:
    tokens = family.default_text_tokens(configs) if text_tokens is None else text_tokens
    frames = default_frames(family, configs)
    found = dict.fromkeys(
        Size(size.height, size.width, tokens, frames if size.frames is None else size.frames)
        for size in sizes
    )
    for size in found:
        check_size(family, configs, size)
    return list(found)


def _source(checkpoint: Path, loras: Sequence[Lora] = ()) -> tuple[Checkpoint, Family, Configs]:
    source = Checkpoint(resolve_checkpoint(str(checkpoint)), tuple(loras))
    family = detect(source.path)
    configs = source.model_configs(family.text_components)
    _check_classes(family, configs)
    return source, family, configs


def _precisions(
    source: Checkpoint, family: Family, wanted: Sequence[str] | None
) -> tuple[Precision, ...]:
    """Float32 first, then the others without repetition."""
    if wanted is None:
        stored = {tensor.dtype for tensor in source.tensors("transformer").values()}
        wanted = [dtype for dtype in ("bfloat16",) if dtype in stored]
    unknown = [dtype for dtype in wanted if dtype not in PRECISIONS]
    if unknown:
        raise InputError(f"precision is one of {', '.join(PRECISIONS)}, found {unknown[0]!r}")
    if "float16" in wanted and family.float16_overflow:
        raise InputError(
            f"the activations of the {family.name} family overflow float16, which gives black "
            f"pictures (reported at {family.float16_overflow}); use bfloat16"
        )
    return tuple(dict.fromkeys([F32, *(PRECISIONS[dtype] for dtype in wanted)]))


def _check_classes(family: Family, configs: Configs) -> None:
    expected_classes = {
        **dict.fromkeys(TRANSFORMERS, family.transformer_class),
        "vae": family.vae_class,
    }
    for part, expected in expected_classes.items():
        if part not in configs:
            continue
        found = configs[part].get("_class_name")
        if found != expected:
            raise ExportError(
                f"{part}/config.json is of a {found}; expected {expected}, as the {family.name} "
                "family has; use an unmodified checkpoint"
            )


def _with_overlays(job: Job) -> Job:
    """The job, with what its LoRAs change written out."""
    if not job.source.loras:
        return job
    from meancache_trt.export.lora_merge import write_overlay  # noqa: PLC0415  imports torch

    job.report(f"merging {', '.join(lora.path.name for lora in job.source.loras)}")
    file = job.root / "transformer" / OVERLAY
    write_overlay(job.source, "transformer", file, job.report)
    return replace(job, overlays={"transformer": file})


def _write_graphs(job: Job) -> dict[str, Component]:
    from meancache_trt.export.graphs import write_graphs  # noqa: PLC0415  imports torch

    return dict(write_graphs(job))


def _write_pipeline(job: Job, components: Mapping[str, Component]) -> tuple[WeightFile, ...]:
    """Configurations of every part, and whole prompt encoders; the encoders' weights."""
    from meancache_trt.export.weights import place_part  # noqa: PLC0415  imports torch

    job.report("prompt encoders")
    source, target = job.source, job.root / PIPELINE_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.path / "model_index.json", target / "model_index.json")
    for part in ("scheduler", *job.transformers, "vae", *job.family.text_components):
        _copy_small_files(source.path / part, target / part)
    weights: list[WeightFile] = []
    for part in job.family.text_components:
        if part in components:  # its graph has them beside it
            weights += components[part].weights
            continue
        folder = f"{PIPELINE_FOLDER}/{part}"
        weights += place_part(job, part, folder)
    return tuple(weights)


def _copy_small_files(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for pattern in _SMALL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _check_parity(job: Job, components: Mapping[str, Component]) -> tuple[ParityRecord, ...]:
    from meancache_trt.export.parity import check_parity  # noqa: PLC0415  imports torch

    job.report("parity with diffusers")
    return check_parity(job, {name: job.root / part.path for name, part in components.items()})


def _exported(
    job: Job,
    components: dict[str, Component],
    encoders: tuple[WeightFile, ...],
    parity: tuple[ParityRecord, ...],
    batch: Range,
) -> Exported:
    family, configs, tokens = job.family, job.configs, job.size.text_tokens
    roles = {record.role for record in components["transformer"].inputs.values()}
    return Exported(
        family=family.name,
        model=identify(job.source),
        components=components,
        encoder_weights=encoders,
        resolutions=tuple(
            resolution(family, configs, size) for size in (job.size, *job.further_sizes)
        ),
        guidance=family.guidance(configs),
        grid=family.grid,
        mu=family.mu,
        timestep_scale=family.timestep_scale,
        num_train_timesteps=int(configs["scheduler"].get("num_train_timesteps", 1000)),
        text_tokens=tokens,
        scheduler=dict(configs["scheduler"]),
        parity=parity,
        frames_per_second=family.frames(configs).per_second if family.frames else None,
        tiling=family.tiling(configs) if family.tiling else None,
        batch=batch,
        text_buckets=text_buckets(tokens) if "text_mask" in roles else (),
        second_stage=job.second_stage,
    )


def identify(checkpoint: Checkpoint) -> Model:
    """Identity of what a schedule is calibrated on: transformers, configurations and LoRAs.

    Hashes the files, unless they are known unchanged since they were last hashed. Raises
    `ExportError` where a file is missing, `InputError` where a LoRA is.
    """
    digest, loras = hashlib.sha256(), tuple(lora.record() for lora in checkpoint.loras)
    try:
        for part in filter(checkpoint.has, TRANSFORMERS):
            digest.update((checkpoint.path / part / "config.json").read_bytes())
            for file in checkpoint.weight_files(part):
                digest.update(bytes.fromhex(verified_sha256(file)))
    except OSError as error:
        raise ExportError(f"{checkpoint.path} is incomplete: {error}; download it again") from error
    for lora in loras:
        digest.update(bytes.fromhex(lora.sha256) + struct.pack("<d", lora.scale))
    name, revision = identity(checkpoint.path)
    added = "".join(f" + {lora.describe()}" for lora in loras)
    return Model(f"{name}{added}", revision, digest.hexdigest(), loras)
