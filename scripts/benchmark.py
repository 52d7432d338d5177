"""Measure what README and the documents quote. Prints one JSON document, and a table on stderr.

    .venv/bin/python scripts/benchmark.py > docs/benchmark.json

Four questions, each answered as ratios within one run: how much of the loop is not the network,
how fast an evaluation is against torch, what a shorter text length saves, and where the time of a
calibration goes.

    .venv/bin/python scripts/benchmark.py --only text_lengths   # one answer, on stdout
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.calibration.baking import BakeOptions, bake_schedules
from meancache_trt.conditioning import paired
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.probe import Probe
from meancache_trt.meancache.runtime import Graph
from meancache_trt.meancache.schedule import bake
from meancache_trt.record import RecordOptions
from meancache_trt.render import Pipeline
from meancache_trt.session import Session
from meancache_trt.text_length import cut_to_bucket

NODES = (0, 1, 3, 7, 14, 21, 28, 35, 42, 49)
SPANS = (1, 2, 1, 1, 1, 1, 1, 1, 4)


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed repetitions of each")
    parser.add_argument("--threads", type=int, default=0, help="cores of a graph; 0 means all")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--only", choices=["text_lengths"], help="measure nothing else")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.only:
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(_text_lengths(Path(work), options), indent=1))
        return
    with tempfile.TemporaryDirectory() as work:
        models = {
            "stand-in": (standins.path("flux"), 64),
            "mid-size": (_write_mid_size(Path(work) / "mid-size"), 128),
        }
        results = [_measure(name, *model, Path(work), options) for name, model in models.items()]
        text_lengths = _text_lengths(Path(work), options)
        calibration = _calibration(Path(work))
    record = {
        "machine": _machine(),
        "models": results,
        "text_lengths": text_lengths,
        "calibration": calibration,
    }
    print(json.dumps(record, indent=1))
    for result in results:
        print(_sentence(result), file=sys.stderr)
    print(f"text lengths: {text_lengths}", file=sys.stderr)
    print(f"calibration: {calibration}", file=sys.stderr)


def _write_mid_size(directory: Path) -> Path:
    """The stand-in's folder with a wider transformer of random weights, 17 M parameters."""
    pipe = FluxPipeline.from_pretrained(standins.path("flux"), dtype=torch.float32)
    config = dict(pipe.transformer.config)
    shape = {"num_attention_heads": 8, "num_layers": 4, "num_single_layers": 8}
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel.from_config({**config, **shape})
    pipe.save_pretrained(directory)
    return directory


def _measure(
    name: str, model: Path, side: int, work: Path, options: argparse.Namespace
) -> dict[str, Any]:
    checkpoint = stages.find_model(str(model))
    exporting = stages.ExportOptions(size=(side, side))
    bundle = stages.export(
        checkpoint, work / f"{name}.mcb", exporting, note=lambda _: None, is_forced=False
    )
    with Pipeline(bundle, threads=options.threads) as pipeline:
        overhead = _loop_overhead(pipeline, options.rounds)
        evaluation = _evaluations(pipeline, model, options)
    transformer = bundle.export.components["transformer"]
    return {
        "model": name,
        "parameters_millions": round(_parameters(model) / 1e6, 2),
        "image_tokens": bundle.export.resolution.symbols["image_tokens"],
        "weight_bytes": transformer.weight_bytes,
        **overhead,
        "evaluation_ms": evaluation,
    }


def _loop_overhead(pipeline: Pipeline, rounds: int) -> dict[str, float]:
    """(loop time - time inside transformer calls) / loop time, median over loops of B = 10."""
    probes: list[Probe] = []

    def probe(graph: Graph) -> Graph:
        probes.append(Probe(graph))
        return probes[-1]

    schedule = bake("official", pipeline.grid(50), NODES, SPANS)
    session = Session(pipeline.graphs, schedule, pipeline.resolution(), wrap_transformer=probe)
    shares, loops = [], []
    for _ in range(rounds + 2):
        for each in probes:
            each.calls_ms.clear()
        start = time.perf_counter()
        session.loop.run()
        loop_ms = 1e3 * (time.perf_counter() - start)
        shares.append(1 - sum(sum(each.calls_ms) for each in probes) / loop_ms)
        loops.append(loop_ms)
    return {
        "loop_ms": statistics.median(loops[2:]),
        "loop_overhead": statistics.median(shares[2:]),
    }


def _evaluations(pipeline: Pipeline, model: Path, options: argparse.Namespace) -> dict[str, float]:
    """Median of one transformer call for each runtime, in alternating blocks."""
    transformer = FluxTransformer2DModel.from_pretrained(
        model, subfolder="transformer", dtype=torch.float32
    ).eval()
    feeds = _torch_feeds(pipeline)
    runs: dict[str, Callable[[], object]] = {
        "onnxruntime": _engine_call(pipeline),
        "torch": lambda: transformer(**feeds),
    }
    if not options.no_compile:
        compiled = torch.compile(transformer)
        runs["torch.compile"] = lambda: compiled(**feeds)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for call in runs.values():
            call()  # compiles, allocates
        for _ in range(options.rounds):
            for name, call in runs.items():
                times[name] += _block_ms(call)
    return {name: statistics.median(measured) for name, measured in times.items()}


def _block_ms(call: Callable[[], object]) -> list[float]:
    """Durations of a few calls, after a pause in which other runtimes' threads go to sleep."""
    time.sleep(0.3)  # OpenMP's workers wait actively for 0.2 s
    call()
    measured = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        measured.append(1e3 * (time.perf_counter() - start))
    return measured


def _engine_call(pipeline: Pipeline) -> Callable[[], None]:
    export = pipeline.bundle.export
    component = export.components["transformer"]
    sizes = {**export.resolution.symbols, "batch": 1}
    tensors = {
        name: pipeline.runtime.zeros(record.resolved(sizes), record.dtype)
        for name, record in {**component.inputs, **component.outputs}.items()
    }
    return pipeline.graphs.graph(component).bind(tensors).enqueue


def _torch_feeds(pipeline: Pipeline) -> dict[str, Any]:
    export = pipeline.bundle.export
    component = export.components["transformer"]
    sizes = {**export.resolution.symbols, "batch": 1}
    feeds = {
        name: torch.zeros(record.resolved(sizes))
        for name, record in component.inputs.items()
        if record.role != "prepared"
    }
    ids = {"img_ids": sizes["image_tokens"], "txt_ids": sizes["text_tokens"]}
    return {
        **feeds,
        **{name: torch.zeros(count, 3) for name, count in ids.items()},
        "return_dict": False,
    }


def _text_lengths(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both stand-ins with a text mask, at the length that a prompt needs and at the full one."""
    return [_text_length(name, work, options) for name in ("qwen_image", "hunyuan_video")]


def _text_length(name: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Median loop time of either length, run in turns, and how far the latents lie apart."""
    checkpoint = stages.find_model(f"standin/{name}")
    exporting = stages.ExportOptions(size=stages.picture_size(checkpoint, None, None))
    bundle = stages.export(
        checkpoint, work / f"{name}.mcb", exporting, note=lambda _: None, is_forced=False
    )
    export, size = bundle.export, bundle.export.resolution
    with Pipeline(bundle, threads=options.threads, embedding_cache="off") as pipeline:
        conditioning = pipeline.encode(standins.prompts("evaluation", name)[:1])
        if export.guidance.is_classifier_free:
            (conditioning,) = paired(conditioning, pipeline.encode([""]))
        given = [cut_to_bucket(export, conditioning), (export.text_tokens, conditioning.tensors)]
        schedule, scale = bake("euler", pipeline.grid(50), NODES), pipeline.guidance()
        noise = philox_normal(0, size.noise_shape)[None]
        rounds = [
            [
                pipeline.session(schedule, size, length).run(noise, tensors, scale)
                for length, tensors in given
            ]
            for _ in range(options.rounds + 2)
        ]
    short, full = (
        statistics.median(run.loop_ms for run in runs[2:]) for runs in zip(*rounds, strict=True)
    )
    latents = [run.latents for run in rounds[0]]
    return {
        "model": name,
        "image_tokens": size.symbols["image_tokens"],
        "text_tokens": [length for length, _ in given],
        "loop_ms": [short, full],
        "ratio": short / full,
        "largest_difference": float(np.abs(latents[0] - latents[1]).max()),
        "largest_value": float(np.abs(latents[1]).max()),
    }


def _calibration(work: Path) -> dict[str, float]:
    """Seconds of a calibration of the stand-in with 16 samples, by stage."""
    checkpoint = stages.find_model("standin/flux")
    recording = RecordOptions(size=(64, 64), prompts=stages.default_prompts(checkpoint))
    start = time.perf_counter()
    trajectories = stages.record_pipeline(
        checkpoint, work / "calibration", recording, note=lambda _: None, report=lambda *_: None
    )
    recorded = time.perf_counter()
    schedules = bake_schedules(trajectories, [10], BakeOptions())
    baked = time.perf_counter()
    return {
        "samples": len(trajectories),
        "network_evaluations": len(trajectories) * trajectories.grid.steps,
        "recording_s": recorded - start,
        "costs_and_path_s": baked - recorded,
        "history": schedules[0].history,
    }


def _parameters(model: Path) -> int:
    transformer = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
    return sum(parameter.numel() for parameter in transformer.parameters())


def _machine() -> dict[str, object]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


def _sentence(result: dict[str, Any]) -> str:
    times = result["evaluation_ms"]
    ratios = ", ".join(f"{times[k] / times['onnxruntime']:.2f} x {k}" for k in times)
    return (
        f"{result['model']}: {result['parameters_millions']} M, {result['image_tokens']} tokens; "
        f"loop overhead {result['loop_overhead']:.2%}; time against ONNX Runtime: {ratios}"
    )


if __name__ == "__main__":
    main()
