"""The tiny random checkpoints of all families, exported in float32 and bfloat16."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.export import export_components
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Family, Size
from meancache_trt.export.registry import detect
from meancache_trt.manifest import Component, Exported, batch_symbols
from tests.export import (
    tiny_flux,
    tiny_flux2,
    tiny_hunyuan_video,
    tiny_qwen_image,
    tiny_sd3,
    tiny_wan,
    tiny_z_image,
)

TINY = {
    "flux": tiny_flux.tiny_pipeline,
    "qwen_image": tiny_qwen_image.tiny_pipeline,
    "hunyuan_video": tiny_hunyuan_video.tiny_pipeline,
    "z_image": tiny_z_image.tiny_pipeline,
    "sd3": tiny_sd3.tiny_pipeline,
    "flux2": tiny_flux2.tiny_pipeline,
    "wan": tiny_wan.tiny_pipeline,
}
TEXT_TOKENS = 12


@dataclass(frozen=True)
class TinyExport:
    """A checkpoint folder and a bundle of it beside."""

    family: Family
    checkpoint: Path
    bundle: Bundle

    @property
    def directory(self) -> Path:
        return self.bundle.directory

    @property
    def exported(self) -> Exported:
        return self.bundle.export

    @cached_property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        parts = ("transformer", "vae", "scheduler", *self.family.text_components)
        return Checkpoint(self.checkpoint).configs(parts)

    def size(self, rows: int, columns: int, text_tokens: int, frames: int) -> Size:
        """So many tokens high and wide; `frames` count only in families of videos."""
        unit = self.family.multiple(self.configs)
        is_video = self.family.frames is not None
        return Size(rows * unit, columns * unit, text_tokens, frames if is_video else None)

    def shapes(self, component: Component, size: Size, batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a component's inputs."""
        symbols = {**self.family.symbols(self.configs, size), **batch_symbols(batch)}
        return {name: record.resolved(symbols) for name, record in component.inputs.items()}


def shared_export(name: str, factory: pytest.TempPathFactory) -> TinyExport:
    """A family's tiny export, made once a test run, also where tests run in processes.

    Do not change it.
    """
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"tiny-{name}"
    checkpoint, bundle = root / "checkpoint", root / "tiny.mcb"
    with FileLock(f"{root}.lock"):
        if not bundle.exists():
            _export(name, checkpoint, bundle)
    return TinyExport(detect(checkpoint), checkpoint, Bundle.open(bundle))


def _export(name: str, checkpoint: Path, bundle: Path) -> None:
    TINY[name]().save_pretrained(checkpoint)

    def fill(target: Path) -> Exported:
        return export_components(
            checkpoint,
            target,
            height=32,
            width=48,
            frames=5 if name in {"hunyuan_video", "wan"} else None,
            text_tokens=TEXT_TOKENS,
            precisions=["bfloat16"],
            check_parity=False,
        )

    create_bundle(bundle, fill, {})
