"""The graph files of a bundle: traced, pointed at the weights, written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import msgspec
import onnx_ir as ir
from torch import nn

from meancache_trt.export.checkpoint import check_tensors
from meancache_trt.export.family import Signature, Size, frame_count
from meancache_trt.export.job import F32, Job, Precision
from meancache_trt.export.optimize import optimize
from meancache_trt.export.trace import build_network, trace
from meancache_trt.export.update import HISTORIES, update_graph, update_signature
from meancache_trt.export.weights import (
    count_bytes,
    place_weights,
    reference_weights,
)
from meancache_trt.manifest import (
    Component,
    TensorRecord,
    batch_symbols,
    component_name,
)

# Rows, columns, text tokens and latent frames that graphs are traced at. All symbols differ, and
# the batch is not 1, which torch.export takes for fixed. None of it stays in the graph, which
# `trace` checks.
_TRACE_ROWS, _TRACE_COLUMNS, _TRACE_TEXT_TOKENS, _TRACE_BATCH = 5, 7, 11, 2
_TRACE_LATENT_FRAMES = 3


@dataclass(frozen=True)
class _Network:
    """A model of the checkpoint, and the graph with weights that is made of it.

    `part` is its folder in the checkpoint, `component` the graph's name and folder in the bundle.
    """

    part: str
    component: str
    class_name: str
    signature: Signature
    graph: Callable[[nn.Module], AbstractContextManager[nn.Module]]


def write_graphs(job: Job) -> Iterator[tuple[str, Component]]:
    """Write every graph of a job, with the weights beside it; name and record of each.

    Weights are checked against config.json before anything is written.
    """
    wrapper, signatures = job.family.wrapper(), job.family.signatures(job.configs)
    transformer = _Network(
        "transformer",
        "transformer",
        job.family.transformer_class,
        signatures.transformer,
        wrapper.transformer_graph,
    )
    decoder = _Network(
        "vae",
        "vae_decoder",
        job.family.vae_class,
        signatures.vae_decoder,
        lambda vae: nullcontext(wrapper.decoder_graph(vae)),
    )
    network, _ = (_built(job, model, F32) for model in (transformer, decoder))
    job.root.mkdir(parents=True, exist_ok=True)
    job.report("prepare graph")
    preparation = wrapper.prepare_graph(network, job.configs)
    yield "prepare", _unweighted(job, "prepare.onnx", preparation, signatures.prepare)
    job.report("update graphs")
    yield from _updates(job, signatures.prepare.outputs)
    for model in (transformer, decoder):
        yield from _weighted(job, model)


def _built(job: Job, model: _Network, precision: Precision) -> nn.Module:
    """The model without weights, after a check that the checkpoint has those that it needs."""
    network = build_network(model.class_name, job.configs[model.part], precision.dtype)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    check_tensors(model.part, job.source.tensors(model.part), expected)
    return network


def _trace(job: Job, module: nn.Module, signature: Signature, precision: Precision) -> ir.Model:
    unit = job.family.multiple(job.configs)
    frames = frame_count(job.family, job.configs, _TRACE_LATENT_FRAMES)
    size = Size(_TRACE_ROWS * unit, _TRACE_COLUMNS * unit, _TRACE_TEXT_TOKENS, frames)
    symbols = {**job.family.symbols(job.configs, size), **batch_symbols(_TRACE_BATCH)}
    return trace(module, signature, symbols, opset=precision.opset)


def _unweighted(job: Job, path: str, module: nn.Module, signature: Signature) -> Component:
    model = _trace(job, module, signature, F32)
    optimize(model)
    return _written(job, path, model, signature)


def _weighted(job: Job, model: _Network) -> Iterator[tuple[str, Component]]:
    """The graph in each precision, in one folder with the weights that all of them point into."""
    stored = job.source.tensors(model.part)
    sources = job.source.weight_files(model.part)
    files = place_weights(sources, job.root, model.component, job.placement)
    for precision in job.precisions:
        name = component_name(model.component, precision.dtype)
        job.report(f"{name} graph")
        with model.graph(_built(job, model, precision)) as module:
            graph = _trace(job, module, model.signature, precision)
        reference_weights(graph, stored)
        optimize(graph)
        path = f"{model.component}/{_graph_file(precision)}"
        component = _written(job, path, graph, model.signature, precision)
        yield name, msgspec.structs.replace(component, weights=files)


def _graph_file(precision: Precision) -> str:
    return "model.onnx" if precision == F32 else f"model.{precision.dtype}.onnx"


def _updates(job: Job, prepared: Mapping[str, TensorRecord]) -> Iterator[tuple[str, Component]]:
    rule = job.family.guidance(job.configs).rule
    latent = next(record for record in prepared.values() if record.role == "latent")
    for history in HISTORIES:
        signature = update_signature(rule, latent, history)
        model = ir.from_proto(update_graph(rule, signature, opset=F32.opset))
        name = f"update/h{history}"
        yield name, _written(job, f"{name}.onnx", model, signature)


def _written(
    job: Job,
    path: str,
    model: ir.Model,
    signature: Signature,
    precision: Precision = F32,
) -> Component:
    target = job.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    total, shared = count_bytes(model)
    return Component(
        path=path,
        inputs=signature.inputs,
        outputs=signature.outputs,
        precision=precision.dtype,
        opset=precision.opset,
        weight_bytes=total,
        shared_bytes=shared,
    )
