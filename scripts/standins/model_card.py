"""Writes the model cards of the stand-ins from the phases' measurements."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

_COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Card:
    """A template beside this file, and the phases whose measurements it tells."""

    template: str
    autoencoder_phases: tuple[str, ...]


FLUX = Card("flux_card.md", ("autoencoder", "decoder"))
HUNYUAN_VIDEO = Card("hunyuan_video_card.md", ("autoencoder",))


def write(card: Card, work: Path, pipeline_folder: Path) -> None:
    """Writes `README.md` into the pipeline folder."""
    names = (*card.autoencoder_phases, "flow", "distilled")
    phases = {name: _read(work, name) for name in names}
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    counts = {
        name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in _COMPONENTS
    }
    text = (
        Path(__file__)
        .with_name(card.template)
        .read_text()
        .format(
            total=sum(counts.values()) / 1e6,
            megabytes=_size_bytes(pipeline_folder) / 1e6,
            words=len(pipeline.tokenizer),
            words_2=len(pipeline.tokenizer_2),
            minutes=sum(phase["measurements"]["seconds"] for phase in phases.values()) / 60,
            rows="\n".join(_row(name, phase) for name, phase in phases.items()),
            psnr=phases[card.autoencoder_phases[-1]]["measurements"]["psnr_db"],
            dropout=phases["flow"]["options"]["caption_dropout"],
            flow_curve=_curve(phases["flow"]),
            distil_curve=_curve(phases["distilled"]),
            evaluation=_text(work / "evaluation.md"),
            notes=_text(work / "notes.md"),
            **counts,
        )
    )
    (pipeline_folder / "README.md").write_text(text)


def _read(work: Path, phase: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((work / f"{phase}.json").read_text())
    return content


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _row(name: str, phase: dict[str, Any]) -> str:
    measured, options = phase["measurements"], phase["options"]
    columns = (name, f"{measured['seconds']:.0f}", measured["steps"], options["batch_size"])
    return f"| {' | '.join(map(str, columns))} | {measured['loss']:.4f} |"


def _curve(phase: dict[str, Any]) -> str:
    return ", ".join(f"{loss:.4f} at {step}" for step, loss in phase["measurements"]["curve"])


def _text(file: Path) -> str:
    """What `judge.py` or a person left for the card, if anything."""
    return file.read_text() if file.exists() else ""
