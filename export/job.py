"""One export: what is read, what is asked for, and where it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Configs, Family, Size

WeightPlacement = Literal["link", "copy"]


@dataclass(frozen=True)
class Precision:
    """The network's dtype, as manifests name it, and the opset that it takes."""

    dtype: str
    opset: int


F32 = Precision("float32", opset=20)
"""What ONNX Runtime, OpenVINO and TensorRT all take; TensorRT refuses opset 23's float32 Attention.
"""


@dataclass(frozen=True)
class Job:
    """An export whose sizes have been checked; `report` gets a line at each stage.

    `size` is the default, `further_sizes` are what the bundle also lists.
    """

    source: Checkpoint
    family: Family
    configs: Configs
    size: Size
    root: Path
    placement: WeightPlacement
    report: Callable[[str], None]
    precision: Precision = F32
    further_sizes: tuple[Size, ...] = ()
