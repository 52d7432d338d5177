"""Writes the model cards of the stand-ins from the phases' measurements."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


@dataclass(frozen=True)
class Card:
    """A template beside this file, and the phases whose measurements it tells.

    The last one leaves the weights of the pipeline's text encoders and transformer.
    """

    template: str
    phases: tuple[str, ...]


FLUX = Card("flux_card.md", ("autoencoder", "decoder", "flow", "distilled"))
HUNYUAN_VIDEO = Card("hunyuan_video_card.md", ("autoencoder", "flow", "distilled"))
QWEN_IMAGE = Card("qwen_image_card.md", ("autoencoder", "decoder", "flow"))


def write(card: Card, work: Path, pipeline_folder: Path) -> None:
    """Writes `README.md` into the pipeline folder."""
    phases = {name: json.loads((work / f"{name}.json").read_text()) for name in card.phases}
    measured = {name: phase["measurements"] for name, phase in phases.items()}
    parts = DiffusionPipeline.from_pretrained(pipeline_folder).components
    counts = _parameter_counts(parts)
    values = {
        "total": sum(counts.values()) / 1e6,
        "megabytes": _size_bytes(pipeline_folder) / 1e6,
        "words": {name: len(part) for name, part in parts.items() if "tokenizer" in name},
        "minutes": sum(found["seconds"] for found in measured.values()) / 60,
        "rows": "\n".join(_row(name, phase) for name, phase in phases.items()),
        "psnr": [found["psnr_db"] for found in measured.values() if "psnr_db" in found][-1],
        "dropout": phases["flow"]["options"]["caption_dropout"],
        "curves": {name: _curve(found) for name, found in measured.items() if "curve" in found},
        "evaluation": _text(work / "evaluation.md"),
        "notes": _text(work / "notes.md"),
    }
    template = Path(__file__).with_name(card.template).read_text()
    (pipeline_folder / "README.md").write_text(template.format(**values, **counts))


def _parameter_counts(parts: dict[str, Any]) -> dict[str, int]:
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in parts.items()
        if isinstance(part, nn.Module)
    }


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _row(name: str, phase: dict[str, Any]) -> str:
    measured, options = phase["measurements"], phase["options"]
    columns = (name, f"{measured['seconds']:.0f}", measured["steps"], options["batch_size"])
    return f"| {' | '.join(map(str, columns))} | {measured['loss']:.4f} |"


def _curve(measured: dict[str, Any]) -> str:
    return ", ".join(f"{loss:.4f} at {step}" for step, loss in measured["curve"])


def _text(file: Path) -> str:
    """What `judge.py` or a person left for the card, if anything."""
    return file.read_text() if file.exists() else ""
