"""A bundle of two transformers, made of one that has a single one."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meancache_trt.bundle import MANIFEST, Bundle, create_bundle
from meancache_trt.export.safetensors_file import read_tensors
from meancache_trt.manifest import Component, Exported, batch_symbols
from meancache_trt.meancache.hashing import sha256_of
from meancache_trt.meancache.sigmas import SecondStage

Arrays = dict[str, NDArray[Any]]

WEIGHT_SCALE = 1.25
"""What the second transformer's weights are of the first one's: enough to be another network."""


def with_second_stage(source: Bundle, directory: Path, second_stage: SecondStage) -> Bundle:
    """A copy of `source` with a transformer_2, whose weights are those of the first, scaled."""

    def fill(target: Path) -> Exported:
        _copy(source, target)
        shutil.copytree(target / "transformer", target / "transformer_2")
        for file in (target / "transformer_2").glob("*.safetensors"):
            scale_weights(file)
        config = target / "pipeline" / "transformer"
        shutil.copytree(config, target / "pipeline" / "transformer_2")
        return two_staged(source.export, second_stage, target)

    return create_bundle(directory, fill, {})


def with_export(source: Bundle, directory: Path, export: Exported) -> Bundle:
    """A copy of `source` whose manifest says this of it."""

    def fill(target: Path) -> Exported:
        _copy(source, target)
        return export

    return create_bundle(directory, fill, {})


def _copy(source: Bundle, target: Path) -> None:
    ignored = shutil.ignore_patterns(MANIFEST, "schedules", ".lock")
    shutil.copytree(source.directory, target, dirs_exist_ok=True, ignore=ignored)


def two_staged(export: Exported, second_stage: SecondStage, directory: Path) -> Exported:
    """What the manifest says of `directory`, where the second transformer is."""
    firsts = {
        name: component
        for name, component in export.components.items()
        if PurePosixPath(name).parts[0] == "transformer"
    }
    seconds = {
        name.replace("transformer", "transformer_2", 1): _second(component, directory)
        for name, component in firsts.items()
    }
    return msgspec.structs.replace(
        export, components={**export.components, **seconds}, second_stage=second_stage
    )


def scale_weights(file: Path) -> None:
    """Multiply all float32 weights of a safetensors file where they are."""
    with file.open("r+b") as opened:
        for tensor in read_tensors(file).values():
            opened.seek(tensor.offset)
            values = np.frombuffer(opened.read(tensor.length), "<f4") * np.float32(WEIGHT_SCALE)
            opened.seek(tensor.offset)
            opened.write(values.tobytes())


def inputs_of(bundle: Bundle, batch: int) -> tuple[NDArray[np.float32], Arrays]:
    """Noise, and conditioning of prompts and negative prompts of the full text length."""
    random, size = np.random.default_rng(3), bundle.export.resolution
    sizes = {**size.symbols, **batch_symbols(batch)}
    conditioning: Arrays = {}
    for name, record in bundle.export.components["transformer"].inputs.items():
        shape = record.resolved(sizes)
        if record.role == "conditioning":
            conditioning[name] = random.standard_normal(shape).astype(np.float32)
        elif record.role == "text_mask":
            conditioning[name] = np.ones(shape, record.dtype)
    return random.standard_normal((batch, *size.noise_shape)).astype(np.float32), conditioning


def _second(component: Component, directory: Path) -> Component:
    def moved(path: str) -> str:
        return path.replace("transformer/", "transformer_2/", 1)

    weights = tuple(
        msgspec.structs.replace(
            file,
            path=moved(file.path),
            sha256=sha256_of(directory / moved(file.path)),
            is_linked=False,
        )
        for file in component.weights
    )
    return msgspec.structs.replace(component, path=moved(component.path), weights=weights)
