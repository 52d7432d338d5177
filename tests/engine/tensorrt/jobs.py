"""Graphs, builds and bundles that take a moment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx

from meancache_trt import standins
from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.engine.tensorrt.builder import BuildJob, Built, build
from meancache_trt.engine.tensorrt.library import load_library
from meancache_trt.engine.tensorrt.record import BuildOptions, PlanKey, ShapeRange
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Size, resolution
from meancache_trt.export.flux import FLUX
from meancache_trt.export.job import PIPELINE_FOLDER
from meancache_trt.export.update import update_graph, update_signature
from meancache_trt.manifest import Component, Exported, Model
from meancache_trt.meancache.hashing import sha256_of

SLOW_HISTORY = 192
"""An update graph over which TensorRT for RTX sits for half a minute, most of it in one phase."""

PARTS = ("transformer", "vae", "scheduler", *FLUX.text_components)


def make_job(
    graph: Path,
    folder: Path,
    profile: Mapping[str, ShapeRange],
    *,
    capability: str = "8.9",
    options: BuildOptions | None = None,
) -> BuildJob:
    """A build of `graph` by TensorRT for RTX, into a file in `folder`."""
    key = PlanKey(
        component=graph.stem,
        graph=sha256_of(graph) if graph.exists() else "none",
        precision="float32",
        profile=profile,
        flavour="tensorrt_rtx",
        version=load_library("tensorrt_rtx").version,
        compute_capability=capability,
        options=options or BuildOptions(),
    )
    return BuildJob(graph=str(graph), plan=str(folder / f"{graph.stem}.plan"), key=key)


def build_alone(
    graph: Path,
    folder: Path,
    profile: Mapping[str, ShapeRange],
    *,
    capability: str = "8.9",
    options: BuildOptions | None = None,
) -> Built:
    """Build in this process."""
    return build(make_job(graph, folder, profile, capability=capability, options=options))


def write_update(folder: Path, history: int) -> tuple[Component, dict[str, ShapeRange]]:
    """The update graph of the FLUX stand-in, and shapes for its inputs; path relative to folder."""
    configs = Checkpoint(standins.path("flux")).configs(PARTS)
    outputs = FLUX.signatures(configs).prepare.outputs.values()
    (latent,) = (record for record in outputs if record.role == "latent")
    signature = update_signature("embedded", latent, history)
    path = folder / "update" / f"h{history}.onnx"
    path.parent.mkdir(exist_ok=True)
    onnx.save(update_graph("embedded", signature, opset=20), path)
    sizes = [{"batch": batch, "image_tokens": 16} for batch in (1, 1, 2)]
    profile = {
        name: ShapeRange(*(record.resolved(symbols) for symbols in sizes))
        for name, record in signature.inputs.items()
    }
    component = Component(f"update/h{history}.onnx", signature.inputs, signature.outputs)
    return component, profile


def make_bundle(directory: Path, *histories: int) -> Bundle:
    """A bundle of the FLUX stand-in that has these update graphs and nothing else."""
    source = Checkpoint(standins.path("flux"))
    configs = source.configs(PARTS)

    def fill(target: Path) -> Exported:
        for part in PARTS:
            (target / PIPELINE_FOLDER / part).mkdir(parents=True)
            for file in (source.path / part).glob("*.json"):
                shutil.copy(file, target / PIPELINE_FOLDER / part)
        return Exported(
            family=FLUX.name,
            model=Model(name="flux", revision=None, digest="0"),
            components={f"update/h{n}": write_update(target, n)[0] for n in histories},
            encoder_weights=(),
            resolutions=(resolution(FLUX, configs, Size(64, 64, 32)),),
            guidance=FLUX.guidance(configs),
            grid=FLUX.grid,
            timestep_scale=FLUX.timestep_scale,
            num_train_timesteps=1000,
            text_tokens=32,
            scheduler={},
            parity=(),
        )

    return create_bundle(directory, fill, {})
