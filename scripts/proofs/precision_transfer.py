"""Asks whether schedules that were fitted to a float32 network serve the same network in bfloat16.

On every stand-in: PSNR of fitted schedules against all steps of the network that runs them, where
they were fitted to that network, where they were fitted to it in the other precision, and where
recordings in float32 were fitted to by the network in bfloat16; and all steps in bfloat16 against
all steps in float32, the noise floor.

The bfloat16 network is the module that the bfloat16 graph is traced from, run by torch: parameters
and activations bfloat16, rotation and timestep float32, as in the graph. Latents, update and
decoder are float32 in both, as in every host.

    scripts/prove precision-transfer [STANDIN ...]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import bake_schedules
from meancache_trt.calibration.metrics import paired_difference, psnr, summarize
from meancache_trt.calibration.trajectories import (
    Array,
    OnStep,
    Prompt,
    Settings,
    Trajectories,
    record,
)
from meancache_trt.engine.onnxruntime import HostTensor, OnnxRuntime, OnnxRuntimeGraph
from meancache_trt.engine_field import EngineField, engine_field
from meancache_trt.evaluate.renderer import EngineRenderer
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Size
from meancache_trt.export.job import Job
from meancache_trt.export.networks import transformers
from meancache_trt.export.registry import detect
from meancache_trt.graphs import Graphs
from meancache_trt.meancache.runtime import Tensor, TensorSpec
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline

NAMES = ("flux", "qwen_image", "hunyuan_video")
PRECISIONS = ("float32", "bfloat16")
BUDGETS = (6, 8, 10, 15)
SAMPLES, PROMPTS, BATCH, STEPS = 16, 32, 16, 50
MIXED = "float32 and bfloat16"
TARGET = Path(__file__).parents[2] / "docs" / "proof" / "precision-transfer.json"

Fitted = dict[str, dict[int, Schedule]]
"""Precision of the network, or `MIXED` -> budget -> the schedule that was fitted to it."""


class TorchGraph:
    """A module whose `forward` takes a graph's inputs by name, in the place of that graph."""

    inputs: Mapping[str, TensorSpec] = {}
    outputs: Mapping[str, TensorSpec] = {}

    def __init__(self, module: nn.Module, output: str) -> None:
        self._module, self._output = module, output

    def bind(self, tensors: Mapping[str, Tensor]) -> TorchCall:
        """See `Graph`; the tensors are read and written in place."""
        shared = {name: torch.from_numpy(_array(tensor)) for name, tensor in tensors.items()}
        return TorchCall(self._module, shared, shared.pop(self._output))


@dataclass(frozen=True)
class TorchCall:
    """One execution of a module between tensors of fixed address."""

    module: nn.Module
    inputs: Mapping[str, torch.Tensor]
    output: torch.Tensor

    def enqueue(self) -> None:
        """See `Call`; done when it returns."""
        with torch.inference_mode():
            self.output.copy_(self.module(**self.inputs))


class RoundedRuntime(OnnxRuntime):
    """ONNX Runtime, but for one graph, which is a module."""

    def __init__(self, path: Path, graph: TorchGraph) -> None:
        super().__init__(threads=1)
        self._path, self._graph = path, graph

    def load(self, path: Path, *, is_light: bool = False) -> OnnxRuntimeGraph:
        """See `Runtime`."""
        if path == self._path:
            return self._graph  # type: ignore[return-value]  # a Graph, which is all hosts ask for
        return super().load(path, is_light=is_light)


def main() -> None:
    """Measure the stand-ins that are named, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("standins", nargs="*", default=NAMES, metavar="STANDIN")
    torch.set_num_threads(1)
    proof = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    proof |= {"torch": torch.__version__, "samples": SAMPLES, "prompts": PROMPTS, "steps": STEPS}
    for name in parser.parse_args().standins:
        proof.setdefault("standins", {})[name] = _prove(name)
        TARGET.write_text(json.dumps(proof, indent=1) + "\n", encoding="utf-8")
    _print(proof["standins"])


def _prove(name: str) -> dict[str, object]:
    started = time.perf_counter()
    checkpoint = stages.find_model(f"standin/{name}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        size = stages.picture_size(checkpoint, None, None)
        options = RecordOptions(
            size=size, prompts=stages.default_prompts(checkpoint), samples=SAMPLES, steps=STEPS
        )
        recorded = stages.record_pipeline(
            checkpoint, work / "float32", options, note=_note, report=lambda *_: None
        )
        exporting = stages.ExportOptions(size=size)
        bundle = stages.export(
            checkpoint, work / "standin.mcb", exporting, note=_note, is_forced=False
        )
        exact = stack.enter_context(Pipeline(bundle, threads=1))
        rounded = stack.enter_context(_rounded(bundle, checkpoint))
        pipelines = dict(zip(PRECISIONS, (exact, rounded), strict=True))
        recordings = {
            "float32": recorded,
            "bfloat16": _recorded_again(rounded, recorded, work / "bfloat16"),
        }
        fitted = {
            precision: _fitted(pipelines[precision], recordings[precision])
            for precision in PRECISIONS
        }
        stated = msgspec.structs.replace(recorded.settings, precision="bfloat16")
        mixed = Trajectories(recorded.directory, stated, recorded.samples)
        fitted[MIXED] = _fitted(rounded, mixed)
        rows, floor = _rows(pipelines, fitted, name, work)
    return {
        "noise_floor_db": floor,
        "seconds": round(time.perf_counter() - started),
        "rows": rows,
    }


@contextlib.contextmanager
def _rounded(bundle: Bundle, checkpoint: Checkpoint) -> Iterator[Pipeline]:
    """The bundle's pipeline with its network in bfloat16."""
    component = bundle.export.components["transformer"]
    with _module(bundle, checkpoint) as module:
        graph = TorchGraph(module, component.output_named("velocity"))
        named = msgspec.structs.replace(component, precision="bfloat16")
        components = {**bundle.export.components, "transformer": named}
        export = msgspec.structs.replace(bundle.export, components=components)
        manifest = msgspec.structs.replace(bundle.manifest, export=export)
        variant = Bundle(bundle.directory, manifest)
        with Pipeline(variant, threads=1) as pipeline:
            pipeline.runtime = RoundedRuntime(bundle.component_path(component), graph)
            pipeline.graphs = Graphs(variant, pipeline.runtime)
            yield pipeline


@contextlib.contextmanager
def _module(bundle: Bundle, checkpoint: Checkpoint) -> Iterator[nn.Module]:
    """What the bfloat16 graph is traced from, with its weights."""
    family, resolution = detect(checkpoint.path), bundle.export.resolution
    configs = checkpoint.configs(("transformer", "vae", "scheduler", *family.text_components))
    size = Size(resolution.height, resolution.width, bundle.export.text_tokens, resolution.frames)
    job = Job(checkpoint, family, configs, size, bundle.directory, "link", _note)
    (network,) = transformers(job)
    model = network.load()
    for parameter in model.parameters():  # and no buffers, as `build_network` has it
        parameter.data = parameter.data.to(torch.bfloat16)
    with network.traceable(model) as module:
        yield module


def _recorded_again(pipeline: Pipeline, recorded: Trajectories, directory: Path) -> Trajectories:
    """The same prompts and noise, integrated with the network of `pipeline`."""
    settings = msgspec.structs.replace(recorded.settings, precision="bfloat16")
    wanted = Trajectories(recorded.directory, settings, recorded.samples)
    prompts = [sample.prompt for sample in recorded.samples]
    with engine_field(pipeline, wanted) as field:
        starts = {prompt: recorded.initial(index) for index, prompt in enumerate(prompts)}
        return record(directory, settings, EulerSampler(field, settings, starts), prompts)


@dataclass(frozen=True)
class EulerSampler:
    """All steps of a velocity field, from starts that are given; see `Sampler`."""

    field: EngineField
    settings: Settings
    starts: Mapping[Prompt, Array]

    def __call__(self, prompt: Prompt, on_step: OnStep) -> tuple[Array, Array]:
        """See `Sampler`."""
        latent = self.starts[prompt][None]
        moves = np.diff(self.settings.grid.array()).astype(np.float32)
        for step, move in enumerate(moves):
            velocity = self.field([prompt], latent, step)
            on_step(step, velocity[0])
            latent = latent + move * velocity
        return self.starts[prompt], latent[0]


def _fitted(pipeline: Pipeline, recorded: Trajectories) -> dict[int, Schedule]:
    _note(f"fitting in {recorded.settings.precision}")
    with engine_field(pipeline, recorded) as field:
        return {
            schedule.budget: schedule for schedule in bake_schedules(recorded, BUDGETS, None, field)
        }


class Gallery:
    """Pictures of the evaluation prompts by one network, whatever a schedule was fitted to."""

    def __init__(self, pipeline: Pipeline, prompts: Sequence[Prompt], work: Path) -> None:
        directory = Path(tempfile.mkdtemp(dir=work))
        resolution = pipeline.bundle.export.resolution
        self._prompts = prompts
        self._precision = pipeline.graphs.network("transformer").precision
        self._renderer = EngineRenderer(pipeline, resolution, directory, batch=BATCH)
        self.full = self.pictures(bake("euler", self._renderer.grid(STEPS), range(STEPS)))

    def pictures(self, schedule: Schedule) -> np.ndarray:
        """One of each prompt."""
        forced = msgspec.structs.replace(schedule, precision=self._precision)
        render = self._renderer.open(forced)
        firsts = range(0, len(self._prompts), BATCH)
        batches = [self._prompts[first : first + BATCH] for first in firsts]
        return np.concatenate([render(batch).pictures for batch in batches])

    def psnr(self, schedule: Schedule) -> np.ndarray:
        """Of each picture in dB, against all steps of this network."""
        return psnr(self.pictures(schedule), self.full)


def _rows(
    pipelines: Mapping[str, Pipeline], fitted: Fitted, name: str, work: Path
) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Every budget, and the noise floor."""
    texts = standins.prompts("evaluation", name)[:PROMPTS]
    prompts = [Prompt(text, seed=1000 + index) for index, text in enumerate(texts)]
    _note("rendering all steps")
    galleries = {
        precision: Gallery(pipeline, prompts, work) for precision, pipeline in pipelines.items()
    }
    rows = []
    for budget in BUDGETS:
        _note(f"rendering {budget} evaluations")
        found = {
            (made, run): galleries[run].psnr(fitted[made][budget])
            for made, run in (*itertools.product(PRECISIONS, PRECISIONS), (MIXED, "bfloat16"))
        }
        row: dict[str, object] = {"budget": budget}
        for (made, run), values in found.items():
            row[f"fitted in {made}, run in {run}"] = _summary(values)
        for (made, run), values in found.items():
            if made != run:
                gap = paired_difference(values, found[run, run])
                row[f"gain of fitting in {made}, run in {run}"] = {
                    "mean": gap.mean,
                    "standard_error": gap.standard_error,
                }
        rows.append(row)
    return rows, _summary(psnr(galleries["bfloat16"].full, galleries["float32"].full))


def _summary(values: np.ndarray) -> dict[str, float]:
    found = summarize(values)
    return {"mean": found.mean, "p5": found.p5, "worst": found.worst}


def _array(tensor: Tensor) -> np.ndarray:
    assert isinstance(tensor, HostTensor)
    return tensor.array


def _print(standins_proof: Mapping[str, Mapping[str, object]]) -> None:
    for name, proof in standins_proof.items():
        print(f"\n{name}: PSNR dB, mean/p5/worst; noise floor {_cell(proof['noise_floor_db'])}")
        for row in proof["rows"]:  # type: ignore[attr-defined]
            print("  " + "; ".join(f"{key} {_cell(value)}" for key, value in row.items()))


def _cell(value: object) -> str:
    if isinstance(value, dict) and "worst" in value:
        return "{mean:.1f}/{p5:.1f}/{worst:.1f}".format(**value)
    if isinstance(value, dict):
        return "{mean:+.2f} ± {standard_error:.2f}".format(**value)
    return str(value)


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
