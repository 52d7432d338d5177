"""The families that can be exported, and which of them a checkpoint is."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from meancache_trt.errors import ExportError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.flux import FLUX
from meancache_trt.export.flux2 import FLUX2
from meancache_trt.export.hunyuan_video import HUNYUAN_VIDEO
from meancache_trt.export.qwen_image import QWEN_IMAGE
from meancache_trt.export.sd3 import SD3
from meancache_trt.export.wan import WAN
from meancache_trt.export.z_image import Z_IMAGE

if TYPE_CHECKING:
    from pathlib import Path

    from meancache_trt.export.family import Family

FAMILIES = MappingProxyType(
    {family.name: family for family in (FLUX, QWEN_IMAGE, HUNYUAN_VIDEO, Z_IMAGE, SD3, WAN, FLUX2)}
)
"""Family name -> family."""


def detect(checkpoint: Path) -> Family:
    """The family of a diffusers folder, by the pipeline class in its model_index.json.

    Raises `ExportError` where the folder is not a diffusers pipeline or its class is unknown.
    """
    pipeline = Checkpoint(checkpoint).pipeline_class
    for family in FAMILIES.values():
        if pipeline in family.pipelines:
            return family
    supported = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
    raise ExportError(
        f"{checkpoint} is a {pipeline}; supported pipelines are: {supported}. "
        "CONTRIBUTING.md explains how to add a family."
    )
