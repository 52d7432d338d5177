"""Writes the folder of a stand-in's pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from autoencoder import Autoencoder
from diffusers import DiffusionPipeline


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


def without_origin(autoencoder: Autoencoder) -> Autoencoder:
    """A copy whose configuration does not name the folder that it was loaded from."""
    config = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
    copy: Autoencoder = type(autoencoder).from_config(config)
    copy.load_state_dict(autoencoder.state_dict())
    return copy
