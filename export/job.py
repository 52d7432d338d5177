"""One export: what is read, what is asked for, and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Configs, Family, Size
from meancache_trt.meancache.schedule import TRANSFORMERS
from meancache_trt.meancache.sigmas import SecondStage

PIPELINE_FOLDER = "pipeline"
"""Where a bundle keeps what prompts are encoded with, in diffusers layout."""

OVERLAY = "lora.safetensors"
"""What holds the weights that LoRAs change, beside the checkpoint's own files."""

WeightPlacement = Literal["link", "copy"]


@dataclass(frozen=True)
class Precision:
    """The network's dtype, as manifests name it, and the opset that it takes."""

    dtype: str
    opset: int


F32 = Precision("float32", opset=20)
"""What ONNX Runtime, OpenVINO and TensorRT all take; TensorRT refuses opset 23's float32 Attention.
"""

PRECISIONS = {
    precision.dtype: precision
    for precision in (F32, Precision("bfloat16", opset=23), Precision("float16", opset=23))
}
"""By dtype. Opset 23 has Attention, which TensorRT fuses, and bfloat16 convolutions (22)."""


@dataclass(frozen=True)
class Job:
    """An export whose sizes have been checked; `report` gets a line at each stage.

    `size` is the default, `further_sizes` are what the bundle also lists. Graphs with weights are
    made in each of `precisions`, F32 among them. `parity_bytes` is the memory that a comparison may
    take; None means what is free. `second_stage` is that of the family, with its guidance scale.
    `overlays` has a safetensors file in `root` for each part of the checkpoint with weights that
    its LoRAs change; it lies in the folder of the part's graph.
    """

    source: Checkpoint
    family: Family
    configs: Configs
    size: Size
    root: Path
    placement: WeightPlacement
    report: Callable[[str], None]
    precisions: tuple[Precision, ...] = (F32,)
    further_sizes: tuple[Size, ...] = ()
    parity_bytes: int | None = None
    second_stage: SecondStage | None = None
    overlays: Mapping[str, Path] = field(default_factory=dict)

    @property
    def transformers(self) -> tuple[str, ...]:
        """The checkpoint's networks that a render evaluates."""
        return TRANSFORMERS[: 1 if self.second_stage is None else 2]
