"""The graph files of a bundle: traced, pointed at the weights, written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import onnx_ir as ir
from torch import nn

from meancache_trt.export.family import Signature, Size, frame_count
from meancache_trt.export.job import F32, Job, Precision
from meancache_trt.export.networks import (
    Network,
    TextEncoder,
    Transformer,
    text_encoders,
    transformers,
    vae_decoder,
)
from meancache_trt.export.optimize import optimize
from meancache_trt.export.tokenization import write_tokenizer
from meancache_trt.export.trace import trace
from meancache_trt.export.update import HISTORIES, update_graph, update_signature
from meancache_trt.export.weights import (
    count_bytes,
    place_part,
    point_elsewhere,
    reference_weights,
)
from meancache_trt.manifest import (
    Component,
    WeightFile,
    batch_symbols,
    component_name,
)
from meancache_trt.meancache.schedule import TRANSFORMERS

# Rows, columns, text tokens and latent frames that graphs are traced at. All symbols differ, and
# the batch is not 1, which torch.export takes for fixed. None of it stays in the graph, which
# `trace` checks.
_TRACE_ROWS, _TRACE_COLUMNS, _TRACE_TEXT_TOKENS, _TRACE_BATCH = 5, 7, 11, 2
_TRACE_LATENT_FRAMES = 3


def write_graphs(job: Job) -> Iterator[tuple[str, Component]]:
    """Write every graph of a job, with the weights beside it; name and record of each.

    All weights are checked before any graph is written.
    """
    networks = transformers(job)
    models = (*networks, vae_decoder(job), *text_encoders(job))
    for model in models:
        model.check()
    for part in job.family.text_components:
        job.source.tensors(part)
    job.root.mkdir(parents=True, exist_ok=True)
    yield "prepare", _preparation(job, networks[0])
    job.report("update graphs")
    yield from _updates(job)
    for model in models:
        files = place_part(job, model.part, model.folder)
        for precision in job.precisions:
            name = component_name(model.component, precision.dtype)
            if precision not in model.precisions:
                job.report(f"no {name} graph: its activations overflow")
                continue
            job.report(f"{name} graph")
            yield name, write_graph(model, precision, files)


def write_sample(model: Network, target: Path, lists: Sequence[str] | None = None) -> None:
    """Write the float32 graph of `model.sample(lists)`, beside the weights that are in place."""
    network, _ = model.sample(lists)
    graph = _traced(model, network, F32)
    target.write_bytes(ir.to_proto(graph).SerializeToString())


def _preparation(job: Job, model: Transformer) -> Component:
    job.report("prepare graph")
    signature = job.family.signatures(job.configs).prepare
    module = job.family.wrapper().prepare_graph(model.empty(F32.dtype), job.configs)
    graph = _trace(job, module, signature, F32)
    optimize(graph)
    return _written(job, "prepare.onnx", graph, signature)


def write_graph(model: Network, precision: Precision, files: tuple[WeightFile, ...]) -> Component:
    """Write a model's graph, and a text encoder's tokenizer, beside its weights `files`."""
    file = "model.onnx" if precision == F32 else f"model.{precision.dtype}.onnx"
    twin = _twin(model)
    if twin is None:
        graph = _traced(model, model.empty(precision.dtype), precision)
    else:
        graph = ir.load(model.job.root / twin.folder / file)
        point_elsewhere(graph, model.tensors)
    path = f"{model.folder}/{file}"
    component = _written(model.job, path, graph, model.signature, precision, files=files)
    if isinstance(model, TextEncoder) and precision == F32:
        return _with_tokenizer(model, component)
    return component


def _twin(model: Network) -> Network | None:
    """The transformer whose graphs, but for the place of the weights, a second one's are."""
    if model.component != TRANSFORMERS[1]:
        return None
    first = transformers(model.job)[0]
    own, other = ({n: t.dtype for n, t in m.tensors.items()} for m in (model, first))
    return first if own == other else None


def _traced(model: Network, network: nn.Module, precision: Precision) -> ir.Model:
    with model.traceable(network) as module:
        graph = _trace(model.job, module, model.signature, precision)
    reference_weights(graph, model.tensors)
    optimize(graph)
    return graph


def _with_tokenizer(model: TextEncoder, component: Component) -> Component:
    job = model.job
    (ids,) = model.signature.inputs.values()
    _, length = ids.resolved({"batch": 1, "text_tokens": job.size.text_tokens})
    tokenizer = write_tokenizer(job.source, model.text.tokenizer, job.root, model.folder, length)
    return msgspec.structs.replace(component, tokenizer=tokenizer)


def _trace(job: Job, module: nn.Module, signature: Signature, precision: Precision) -> ir.Model:
    unit = job.family.multiple(job.configs)
    frames = frame_count(job.family, job.configs, _TRACE_LATENT_FRAMES)
    size = Size(_TRACE_ROWS * unit, _TRACE_COLUMNS * unit, _TRACE_TEXT_TOKENS, frames)
    symbols = {**job.family.symbols(job.configs, size), **batch_symbols(_TRACE_BATCH)}
    return trace(module, signature, symbols, opset=precision.opset)


def _updates(job: Job) -> Iterator[tuple[str, Component]]:
    rule, prepared = (
        job.family.guidance(job.configs).rule,
        job.family.signatures(job.configs).prepare,
    )
    latent = next(record for record in prepared.outputs.values() if record.role == "latent")
    for history in HISTORIES:
        signature = update_signature(rule, latent, history)
        graph = ir.from_proto(update_graph(rule, signature, opset=F32.opset))
        name = f"update/h{history}"
        yield name, _written(job, f"{name}.onnx", graph, signature)


def _written(
    job: Job,
    path: str,
    graph: ir.Model,
    signature: Signature,
    precision: Precision = F32,
    *,
    files: tuple[WeightFile, ...] = (),
) -> Component:
    for value in graph.graph.outputs:  # the optimiser may give a dimension torch's name for it
        value.shape = ir.Shape(signature.outputs[value.name or ""].shape)
    target = job.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    total, shared = count_bytes(graph, files)
    return Component(
        path=path,
        inputs=signature.inputs,
        outputs=signature.outputs,
        precision=precision.dtype,
        opset=precision.opset,
        weights=files,
        weight_bytes=total,
        shared_bytes=shared,
    )
