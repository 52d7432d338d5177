"""Writes the folder of a stand-in's pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin

Vae = TypeVar("Vae", bound=ModelMixin)


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes a complete half-precision pipeline folder; a reader never sees half a file."""
    partial = folder.with_name(f"{folder.name}.partial")
    pipeline.to(torch.float16).save_pretrained(partial, safe_serialization=True)
    for file in [path for path in partial.rglob("*") if path.is_file()]:
        target = folder / file.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(0o644)
        file.replace(target)
    shutil.rmtree(partial)


def without_origin(autoencoder: Vae) -> Vae:
    """A copy whose configuration does not name the folder that it was loaded from."""
    config = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
    copy: Vae = type(autoencoder).from_config(config)
    copy.load_state_dict(autoencoder.state_dict())
    return copy
