"""Diffusers checkpoints to ONNX graphs that share the checkpoint's weights.

Importing this imports neither torch nor diffusers nor onnx.
"""

from meancache_trt.export.checkpoint import resolve_checkpoint
from meancache_trt.export.family import Family
from meancache_trt.export.job import PIPELINE_FOLDER
from meancache_trt.export.pipeline import export_components
from meancache_trt.export.registry import FAMILIES, detect
from meancache_trt.export.text import PromptEncoder

__all__ = [
    "FAMILIES",
    "PIPELINE_FOLDER",
    "Family",
    "PromptEncoder",
    "detect",
    "export_components",
    "resolve_checkpoint",
]
