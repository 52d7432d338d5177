"""The graph files of a bundle: traced, pointed at the weights, written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import onnx_ir as ir
from torch import nn

from meancache_trt.export.checkpoint import check_tensors
from meancache_trt.export.encoders import EncoderModule, build_encoder, named_as_in_module
from meancache_trt.export.family import Signature, Size, TextGraph, frame_count, resolved
from meancache_trt.export.job import Job
from meancache_trt.export.safetensors_file import StoredTensor
from meancache_trt.export.tokenization import write_tokenizer
from meancache_trt.export.trace import build_network, trace
from meancache_trt.export.update import HISTORIES, update_graph, update_signature
from meancache_trt.export.weights import (
    count_bytes,
    optimize,
    place_weights,
    reference_weights,
)
from meancache_trt.manifest import Component, TensorRecord, WeightFile, batch_symbols

# Rows, columns, text tokens and latent frames that graphs are traced at. All symbols differ, and
# the batch is not 1, which torch.export takes for fixed. None of it stays in the graph, which
# `trace` checks.
_TRACE_ROWS, _TRACE_COLUMNS, _TRACE_TEXT_TOKENS, _TRACE_BATCH = 5, 7, 11, 2
_TRACE_LATENT_FRAMES = 3


def write_graphs(job: Job) -> Iterator[tuple[str, Component]]:
    """Write every graph of a job, with the weights beside it; name and record of each.

    Weights are checked against config.json before anything is written.
    """
    network = _network(job, "transformer", job.family.transformer_class)
    vae = _network(job, "vae", job.family.vae_class)
    job.root.mkdir(parents=True, exist_ok=True)
    wrapper, signatures = job.family.wrapper(), job.family.signatures(job.configs)
    job.report("prepare graph")
    preparation = wrapper.prepare_graph(network, job.configs)
    yield "prepare", _unweighted(job, "prepare.onnx", preparation, signatures.prepare)
    job.report("transformer graph")
    with wrapper.transformer_graph(network) as module:
        yield "transformer", _weighted(job, "transformer", module, signatures.transformer)
    job.report("update graphs")
    yield from _updates(job, signatures.prepare.outputs)
    job.report("VAE decoder graph")
    decoder = wrapper.decoder_graph(vae)
    yield "vae_decoder", _weighted(job, "vae", decoder, signatures.vae_decoder, "vae_decoder")


def text_network(job: Job, text: TextGraph) -> nn.Module:
    """A text encoder without weights. Raises `ExportError` where the checkpoint's do not fit it."""
    folder = job.source.path / text.component
    network = build_encoder(text.encoder_class, folder, job.precision.dtype)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    check_tensors(text.component, _text_weights(job, text, network), expected)
    return network


def write_text_graph(
    job: Job, text: TextGraph, network: nn.Module, folder: str, files: tuple[WeightFile, ...]
) -> Component:
    """Write a text encoder's graph and tokenizer into `folder`, where its weights `files` are."""
    signature = text.signature(job.configs)
    (ids,) = signature.inputs.values()
    _, length = resolved(ids, {"batch": 1, "text_tokens": job.size.text_tokens})
    tokenizer = write_tokenizer(job.source, text.tokenizer, job.root, folder, length)
    weights = _text_weights(job, text, network)
    model = _trace(job, EncoderModule(network, text.field), signature)
    reference_weights(model, weights)
    optimize(model)
    written = _written(job, f"{folder}/model.onnx", model, signature, files)
    return msgspec.structs.replace(written, tokenizer=tokenizer)


def _text_weights(job: Job, text: TextGraph, network: nn.Module) -> dict[str, StoredTensor]:
    return named_as_in_module(job.source.tensors(text.component), network, text.former_prefix)


def _network(job: Job, part: str, class_name: str) -> nn.Module:
    network = build_network(class_name, job.configs[part], job.precision.dtype)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    check_tensors(part, job.source.tensors(part), expected)
    return network


def _trace(job: Job, module: nn.Module, signature: Signature) -> ir.Model:
    unit = job.family.multiple(job.configs)
    frames = frame_count(job.family, job.configs, _TRACE_LATENT_FRAMES)
    size = Size(_TRACE_ROWS * unit, _TRACE_COLUMNS * unit, _TRACE_TEXT_TOKENS, frames)
    symbols = {**job.family.symbols(job.configs, size), **batch_symbols(_TRACE_BATCH)}
    return trace(module, signature, symbols, opset=job.precision.opset)


def _unweighted(job: Job, path: str, module: nn.Module, signature: Signature) -> Component:
    model = _trace(job, module, signature)
    optimize(model)
    return _written(job, path, model, signature)


def _weighted(
    job: Job, part: str, module: nn.Module, signature: Signature, folder: str | None = None
) -> Component:
    """A graph that lies beside the weights it points into, in a folder named as `part` or so."""
    folder = folder or part
    model = _trace(job, module, signature)
    reference_weights(model, job.source.tensors(part))
    optimize(model)
    files = place_weights(job.source.weight_files(part), job.root, folder, job.placement)
    return _written(job, f"{folder}/model.onnx", model, signature, files)


def _updates(job: Job, prepared: Mapping[str, TensorRecord]) -> Iterator[tuple[str, Component]]:
    rule = job.family.guidance(job.configs).rule
    latent = next(record for record in prepared.values() if record.role == "latent")
    for history in HISTORIES:
        signature = update_signature(rule, latent, history)
        model = ir.from_proto(update_graph(rule, signature, opset=job.precision.opset))
        name = f"update/h{history}"
        yield name, _written(job, f"{name}.onnx", model, signature)


def _written(
    job: Job,
    path: str,
    model: ir.Model,
    signature: Signature,
    files: tuple[WeightFile, ...] = (),
) -> Component:
    for value in model.graph.outputs:  # the optimiser may give a dimension torch's name for it
        value.shape = ir.Shape(signature.outputs[value.name or ""].shape)
    target = job.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    total, shared = count_bytes(model)
    return Component(
        path=path,
        inputs=signature.inputs,
        outputs=signature.outputs,
        precision=job.precision.dtype,
        opset=job.precision.opset,
        weights=files,
        weight_bytes=total,
        shared_bytes=shared,
    )
