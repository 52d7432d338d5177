"""Exported graphs against diffusers' and transformers' own modules with the checkpoint's weights.

First the module computes what is expected of every input, then it is dropped and the graph is
loaded: the weights are in memory once. Where even that does not fit, one block of each kind is
compared instead of the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from meancache_trt.engine.memory import available_bytes
from meancache_trt.engine.onnxruntime import OnnxRuntime
from meancache_trt.errors import ExportError
from meancache_trt.export.graphs import write_sample
from meancache_trt.export.job import Job
from meancache_trt.export.networks import (
    Network,
    TextEncoder,
    text_encoders,
    transformers,
    vae_decoder,
)
from meancache_trt.export.parity_inputs import (
    Array,
    Arrays,
    Case,
    parity_cases,
    prepare_feeds,
    random_feeds,
    random_ids,
    text_cases,
    with_prepared,
)
from meancache_trt.export.streaming import stream_weights
from meancache_trt.manifest import ParityRecord
from meancache_trt.tiling import decode_tiled, levels

Tensors = dict[str, torch.Tensor]
Oracle = Callable[[nn.Module, Tensors, Mapping[str, int]], Tensors]
Run = Callable[[Arrays], Arrays]

TOLERANCES = {
    "prepare": 0.0,
    "transformer": 1e-4,
    "transformer_2": 1e-4,
    "vae_decoder": 1e-4,
    "text_encoder": 1e-4,
    "text_encoder_2": 1e-4,
}
"""Largest difference where values are of the order of one; of greater ones, times their root mean
square. The prepare graph only moves numbers that diffusers computed; the others run float32
kernels unlike torch's.
"""

_BYTES_PER_PARAMETER = 6
"""What torch takes: float32, and the two bytes of a stored bfloat16 or float16 that it is made of.
"""


def check_parity(job: Job, graphs: Mapping[str, Path]) -> tuple[ParityRecord, ...]:
    """Compare prepare, transformers, VAE decoder and text graphs in ONNX Runtime on the CPU.

    Loads the checkpoint's weights in float32, of one network at a time, and of one that does not
    fit in memory the first block of each kind. Raises `ExportError` where a graph differs by more
    than its tolerance, `RuntimeUnavailableError` without ONNX Runtime.
    """
    runtime = OnnxRuntime(is_frugal=True)
    return (
        *_transformer_records(job, graphs, runtime),
        _decoder_record(job, graphs, runtime),
        *(_text_record(model, graphs, runtime) for model in text_encoders(job)),
    )


@dataclass(frozen=True)
class _Expected:
    """What a graph is fed, and what the module of its library makes of it.

    `blocks` are those compared, where it was not the whole network.
    """

    component: str
    inputs: list[tuple[Case, Arrays]]
    outputs: list[Arrays]
    blocks: tuple[str, ...] = ()

    def record(self, run: Run, runtime: OnnxRuntime) -> ParityRecord:
        """Compare with what `run` makes of the same inputs."""
        tolerance = TOLERANCES[self.component] * max(1.0, _magnitude(self.outputs))
        errors = [
            _difference(run(feeds), expected)
            for (_, feeds), expected in zip(self.inputs, self.outputs, strict=True)
        ]
        worst = float(np.max(errors))  # NaN stays NaN
        if not worst <= tolerance:
            raise ExportError(
                f"the exported {self.component} differs from diffusers' by {worst:.2e}; expected "
                f"at most {tolerance:.1e}. Please report it with the versions of torch and "
                "diffusers"
            )
        return ParityRecord(
            component=self.component,
            max_abs_error=worst,
            tolerance=tolerance,
            sizes=tuple(case.symbols for case, _ in self.inputs),
            runtime=f"onnxruntime {runtime.version} CPU",
            blocks=self.blocks,
        )


def _expected(
    component: str,
    network: nn.Module,
    oracle: Oracle,
    inputs: list[tuple[Case, Arrays]],
    blocks: tuple[str, ...] = (),
) -> _Expected:
    outputs = []
    for case, feeds in inputs:
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        with torch.inference_mode():
            made = oracle(network, tensors, case.symbols)
        outputs.append({name: value.numpy() for name, value in made.items()})
    return _Expected(component, inputs, outputs, blocks)


def _magnitude(outputs: list[Arrays]) -> float:
    """The root mean square of all values."""
    values = np.concatenate([value.ravel() for made in outputs for value in made.values()])
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _difference(found: Arrays, expected: Arrays) -> float:
    distances = [_distance(found[name], value) for name, value in expected.items()]
    return float(np.max(distances))  # NaN stays NaN


def _distance(found: Array, expected: Array) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max())


def _transformer_records(
    job: Job, graphs: Mapping[str, Path], runtime: OnnxRuntime
) -> Iterator[ParityRecord]:
    wrapper, signatures = job.family.wrapper(), job.family.signatures(job.configs)
    prepare = runtime.load(graphs["prepare"])
    noises, inputs = [], []
    for case in parity_cases(job.family, job.configs, job.size, *job.further_sizes):
        feeds = random_feeds(signatures.transformer, case)
        noise = prepare_feeds(signatures.prepare, case, feeds)
        noises.append((case, noise))
        inputs.append((case, with_prepared(signatures.transformer, feeds, prepare.run(noise))))
    for model in transformers(job):
        records: list[ParityRecord] = []
        for lists in _shares(model):
            network, blocks = _oracle(model, lists)
            preparation = _expected("prepare", network, wrapper.reference_preparation, noises)
            velocities = _expected(
                model.component,
                network,
                lambda *call: {"velocity": wrapper.reference_velocity(*call)},
                inputs,
                blocks,
            )
            del network
            if model.component == "transformer" and not records:
                yield preparation.record(prepare.run, runtime)
            with _compared_graph(model, graphs, lists, is_sample=bool(blocks)) as path:
                records.append(velocities.record(runtime.load(path).run, runtime))
        yield _joined(records)


def _decoder_record(job: Job, graphs: Mapping[str, Path], runtime: OnnxRuntime) -> ParityRecord:
    """The decoder's graph as hosts run it: for each tile in time, and with overshoots clipped.

    So it must equal diffusers' own decoding of the whole latent, tiled where that is.
    """
    wrapper, model = job.family.wrapper(), vae_decoder(job)
    (latent,), (image,) = model.signature.inputs, model.signature.outputs
    cases = parity_cases(job.family, job.configs, job.size, *job.further_sizes)
    expected = _expected(
        "vae_decoder",
        model.load(),
        lambda vae, feeds, symbols: {image: wrapper.reference_image(vae, feeds[latent], symbols)},
        [(case, random_feeds(model.signature, case)) for case in cases],
    )
    graph = runtime.load(graphs["vae_decoder"])
    tiling = job.family.tiling(job.configs) if job.family.tiling else None
    chosen = levels(tiling, is_space_tiled=False)

    def decode(tile: Array) -> Array:
        return graph.run({latent: np.ascontiguousarray(tile)})[image]

    def run(feeds: Arrays) -> Arrays:
        return {image: np.clip(decode_tiled(feeds[latent], chosen, decode), 0, 1)}

    return expected.record(run, runtime)


def _text_record(
    model: TextEncoder, graphs: Mapping[str, Path], runtime: OnnxRuntime
) -> ParityRecord:
    (ids,), (features,) = model.signature.inputs, model.signature.outputs
    network: Any
    network, blocks = _oracle(model)
    expected = _expected(
        model.component,
        network,
        lambda encoder, feeds, _: {features: getattr(encoder(feeds[ids]), model.text.field)},
        [
            (case, random_ids(model.signature, case, network.config))
            for case in text_cases(model.job.size.text_tokens)
        ],
        blocks,
    )
    del network
    with _compared_graph(model, graphs, is_sample=bool(blocks)) as path:
        return expected.record(runtime.load(path).run, runtime)


def _fits(model: Network) -> bool:
    """Whether all of the weights fit in the memory at hand."""
    parameters = sum(math.prod(tensor.shape) for tensor in model.tensors.values())
    limit = model.job.parity_bytes or available_bytes()
    return _BYTES_PER_PARAMETER * parameters <= limit


def _shares(model: Network) -> Sequence[tuple[str, ...] | None]:
    """The lists of blocks that are compared together: None for all.

    One after another where a sample of all, as stored and with its largest tensor in float32, does
    not fit in the memory at hand either.
    """
    if _fits(model):
        return [None]
    names = model.sample()[0].state_dict()
    tensors = [model.tensors[name] for name in names]
    needed = sum(t.length for t in tensors) + 4 * max(math.prod(t.shape) for t in tensors)
    limit = model.job.parity_bytes or available_bytes()
    return [None] if needed <= limit else [(name,) for name in model.blocks]


def _joined(records: Sequence[ParityRecord]) -> ParityRecord:
    """What is nearest to its tolerance, and all blocks."""
    worst = max(records, key=lambda record: record.max_abs_error / record.tolerance)
    blocks = tuple(block for record in records for block in record.blocks)
    return msgspec.structs.replace(worst, blocks=blocks)


def _oracle(
    model: Network, lists: Sequence[str] | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model in float32, or one block of each kind where it does not fit, and their names."""
    if _fits(model):
        return model.load(), ()
    network, blocks = model.sample(lists)
    stream_weights(network, model.tensors)
    return network, blocks


@contextmanager
def _compared_graph(
    model: Network,
    graphs: Mapping[str, Path],
    lists: Sequence[str] | None = None,
    *,
    is_sample: bool,
) -> Iterator[Path]:
    whole = graphs[model.component]
    if not is_sample:
        yield whole
        return
    path = whole.with_name("sample.onnx")
    try:
        write_sample(model, path, lists)
        yield path
    finally:
        path.unlink(missing_ok=True)
