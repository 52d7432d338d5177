"""Exported graphs against diffusers' own, unpatched modules with the checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meancache_trt.errors import ExportError, RuntimeUnavailableError
from meancache_trt.export.family import Configs, Family, Signature, Size, frame_count, resolved
from meancache_trt.export.job import Job
from meancache_trt.manifest import ParityRecord, TensorRecord, batch_symbols

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[Any]
Arrays = dict[str, Array]

TOLERANCES = {"prepare": 0.0, "transformer": 1e-4, "vae_decoder": 1e-4}
"""Largest absolute difference. The prepare graph only moves numbers that diffusers computed; the
others run float32 kernels unlike torch's (seven families measured at most 5e-5)."""

# Rows, columns, text tokens and latent frames of a video: wide, tall, and neither.
_GRIDS = ((2, 5, 7, 4), (9, 4, 13, 1), (3, 3, 16, 2))


@dataclass(frozen=True)
class Case:
    """A size to compare at: its symbols, the batch included, and a seed for its inputs.

    `largest_timestep` is what the network is fed at sigma 1.
    """

    symbols: dict[str, int]
    seed: int
    largest_timestep: float


def parity_cases(family: Family, configs: Configs, *exported: Size) -> list[Case]:
    """Three sizes, with a batch of 1, 2 and 3, none of them an exported one."""
    unit, cases = family.multiple(configs), []
    taken = {(size.height, size.width) for size in exported}
    noisiest = configs["scheduler"].get("num_train_timesteps", 1000) * family.timestep_scale
    for batch, (rows, columns, text_tokens, latent_frames) in enumerate(_GRIDS, start=1):
        frames = frame_count(family, configs, latent_frames)
        size = Size(rows * unit, columns * unit, text_tokens, frames)
        while (size.height, size.width) in taken:
            size = Size(size.height + unit, size.width, text_tokens, frames)
        symbols = {**family.symbols(configs, size), **batch_symbols(batch)}
        cases.append(Case(symbols, seed=batch, largest_timestep=noisiest))
    return cases


@dataclass(frozen=True)
class _Subject:
    """A graph, its signature, and the function of torch tensors that it must equal."""

    component: str
    session: onnxruntime.InferenceSession
    signature: Signature
    oracle: Callable[[dict[str, torch.Tensor], Mapping[str, int]], dict[str, torch.Tensor]]

    def run(self, feeds: Arrays) -> Arrays:
        names = list(self.signature.outputs)
        return dict(zip(names, self.session.run(names, feeds), strict=True))

    def error(self, feeds: Arrays, symbols: Mapping[str, int]) -> float:
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        with torch.inference_mode():
            expected = self.oracle(tensors, symbols)
        found = self.run(feeds)
        return max(_difference(found[name], expected[name].numpy()) for name in expected)


def _difference(found: Array, expected: Array) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max())


def check_parity(job: Job, graphs: Mapping[str, Path]) -> tuple[ParityRecord, ...]:
    """Compare the prepare, transformer and VAE decoder graphs in ONNX Runtime on the CPU.

    Loads the checkpoint's weights in float32. Raises `ExportError` where a graph differs by more
    than its tolerance, `RuntimeUnavailableError` without ONNX Runtime.
    """
    return (*_transformer_records(job, graphs), _decoder_record(job, graphs))


def _transformer_records(job: Job, graphs: Mapping[str, Path]) -> Iterator[ParityRecord]:
    wrapper, signatures = job.family.wrapper(), job.family.signatures(job.configs)
    network = _load(job.family.transformer_class, job.source.path / "transformer")
    (velocity,) = signatures.transformer.outputs
    prepare = _Subject(
        "prepare",
        _session(graphs["prepare"]),
        signatures.prepare,
        lambda feeds, symbols: wrapper.reference_preparation(network, feeds, symbols),
    )
    transformer = _Subject(
        "transformer",
        _session(graphs["transformer"]),
        signatures.transformer,
        lambda feeds, symbols: {velocity: wrapper.reference_velocity(network, feeds, symbols)},
    )
    cases = parity_cases(job.family, job.configs, job.size, *job.further_sizes)
    yield _record(prepare, [(case, _random_feeds(prepare.signature, case)) for case in cases])
    yield _record(
        transformer, [(case, _prepared_feeds(prepare, transformer, case)) for case in cases]
    )


def _decoder_record(job: Job, graphs: Mapping[str, Path]) -> ParityRecord:
    wrapper, signature = job.family.wrapper(), job.family.signatures(job.configs).vae_decoder
    vae = _load(job.family.vae_class, job.source.path / "vae")
    (latent,), (image,) = signature.inputs, signature.outputs
    decoder = _Subject(
        "vae_decoder",
        _session(graphs["vae_decoder"]),
        signature,
        lambda feeds, symbols: {image: wrapper.reference_image(vae, feeds[latent], symbols)},
    )
    cases = parity_cases(job.family, job.configs, job.size, *job.further_sizes)
    return _record(decoder, [(case, _random_feeds(signature, case)) for case in cases])


def _record(subject: _Subject, inputs: list[tuple[Case, Arrays]]) -> ParityRecord:
    tolerance = TOLERANCES[subject.component]
    errors = [subject.error(feeds, case.symbols) for case, feeds in inputs]
    worst = float(np.max(errors))  # NaN stays NaN
    if not worst <= tolerance:
        raise ExportError(
            f"the exported {subject.component} differs from diffusers' by {worst:.2e}; expected at "
            f"most {tolerance:.0e}. Please report it with the versions of torch and diffusers"
        )
    return ParityRecord(
        component=subject.component,
        max_abs_error=worst,
        tolerance=tolerance,
        sizes=tuple(case.symbols for case, _ in inputs),
        runtime=f"onnxruntime {_onnxruntime().__version__} CPU",
    )


def _random_feeds(signature: Signature, case: Case) -> Arrays:
    generator = np.random.default_rng(case.seed)
    return {name: _random(record, case, generator) for name, record in signature.inputs.items()}


def _random(record: TensorRecord, case: Case, generator: np.random.Generator) -> Array:
    shape = resolved(record, case.symbols)
    if record.role == "timestep":
        return generator.uniform(0, case.largest_timestep, shape).astype(record.dtype)
    if record.role == "guidance_scale":
        return generator.uniform(1, 6, shape).astype(record.dtype)
    if record.role == "text_mask":
        lengths = generator.integers(1, shape[1] + 1, (shape[0], 1))
        return (np.arange(shape[1]) < lengths).astype(record.dtype)
    return generator.standard_normal(shape).astype(record.dtype)


def _prepared_feeds(prepare: _Subject, transformer: _Subject, case: Case) -> Arrays:
    """Random inputs, with the latent and the tables that the prepare graph makes."""
    feeds = _random_feeds(transformer.signature, case)
    given = {**_random_feeds(prepare.signature, case), **feeds}
    made = prepare.run({name: given[name] for name in prepare.signature.inputs})
    for name, record in transformer.signature.inputs.items():
        if record.role == "prepared":
            feeds[name] = made[name]
    return feeds


def _load(class_name: str, directory: Path) -> nn.Module:
    network: nn.Module = getattr(diffusers, class_name).from_pretrained(
        directory, local_files_only=True
    )
    return network.float().eval().requires_grad_(False)


def _session(path: Path) -> onnxruntime.InferenceSession:
    return _onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415  an export without a parity check does not need it
    except ImportError as error:
        raise RuntimeUnavailableError(
            "the parity check runs the exported graphs in ONNX Runtime, which is not installed; "
            "install meancache-trt[cpu], or export without the check"
        ) from error
    return onnxruntime
