"""Step caching for flow-matching models inside a compiled engine.

    import meancache_trt

    with meancache_trt.load("flux.mcb") as pipeline:
        pipeline.render(["a prompt"], seed=0, schedule="b10")[0].save("out.png")

Importing this package imports no torch, diffusers, onnxruntime or tensorrt.
"""

from __future__ import annotations

from meancache_trt.bundle import Bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.errors import MeanCacheError
from meancache_trt.meancache.schedule import Schedule, bake, load_schedule, save_schedule
from meancache_trt.production.jobs import Job
from meancache_trt.production.renderer import Renderer
from meancache_trt.render import Pipeline, load
from meancache_trt.rendering import Rendering

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "Conditioning",
    "Job",
    "MeanCacheError",
    "Pipeline",
    "Renderer",
    "Rendering",
    "Schedule",
    "bake",
    "load",
    "load_schedule",
    "save_schedule",
]
