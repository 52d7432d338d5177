"""Writes a stand-in's model card from the phases' measurements."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


@dataclass(frozen=True)
class Card:
    """What a stand-in's card is made of: `template` holds the text, in this folder."""

    template: str
    phases: tuple[str, ...]


FLUX = Card("flux_card.md", ("autoencoder", "decoder", "flow", "distilled"))
QWEN_IMAGE = Card("qwen_image_card.md", ("autoencoder", "decoder", "flow"))


def write(work: Path, pipeline_folder: Path, card: Card = FLUX) -> None:
    """Writes `README.md` into the pipeline folder."""
    phases = {name: _read(work, name) for name in card.phases}
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    counts = _parameter_counts(pipeline)
    text = (
        Path(__file__)
        .with_name(card.template)
        .read_text()
        .format(
            total=sum(counts.values()) / 1e6,
            megabytes=_size_bytes(pipeline_folder) / 1e6,
            words={
                name: len(part) for name, part in pipeline.components.items() if "tokenizer" in name
            },
            minutes=sum(phase["measurements"]["seconds"] for phase in phases.values()) / 60,
            rows="\n".join(_row(name, phase) for name, phase in phases.items()),
            psnr=phases["decoder"]["measurements"]["psnr_db"],
            dropout=phases["flow"]["options"]["caption_dropout"],
            curves={name: _curve(phase) for name, phase in phases.items()},
            evaluation=_text(work / "evaluation.md"),
            notes=_text(work / "notes.md"),
            **counts,
        )
    )
    (pipeline_folder / "README.md").write_text(text)


def _read(work: Path, phase: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((work / f"{phase}.json").read_text())
    return content


def _parameter_counts(pipeline: DiffusionPipeline) -> dict[str, int]:
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _row(name: str, phase: dict[str, Any]) -> str:
    measured, options = phase["measurements"], phase["options"]
    columns = (name, f"{measured['seconds']:.0f}", measured["steps"], options["batch_size"])
    return f"| {' | '.join(map(str, columns))} | {measured['loss']:.4f} |"


def _curve(phase: dict[str, Any]) -> str:
    curve = phase["measurements"].get("curve", [])
    return ", ".join(f"{loss:.4f} at {step}" for step, loss in curve)


def _text(file: Path) -> str:
    """What `judge.py` or a person left for the card, if anything."""
    return file.read_text() if file.exists() else ""
