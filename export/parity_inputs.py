"""Sizes and random inputs at which exported graphs are compared with diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.export.family import Configs, Family, Signature, Size, frame_count
from meancache_trt.manifest import TensorRecord, batch_symbols

Array = NDArray[Any]
Arrays = dict[str, Array]

# Rows, columns, text tokens and latent frames of a video: wide, tall, and neither. Six latent
# frames are two tiles in time of the decoder of HunyuanVideo; Z-Image pads prompts of up to 45
# tokens to 32 or to 64.
_GRIDS = ((2, 5, 7, 6), (9, 4, 45, 1), (3, 3, 16, 2))


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


def text_cases(text_tokens: int) -> list[Case]:
    """Three lengths of text, the exported one alone in its batch."""
    return [
        Case({"text_tokens": tokens, **batch_symbols(batch)}, seed=batch, largest_timestep=0.0)
        for batch, tokens in ((3, 7), (2, 13), (1, text_tokens))
    ]


def random_feeds(signature: Signature, case: Case) -> Arrays:
    """Values in the range that each input has in a render, by name."""
    generator = np.random.default_rng(case.seed)
    return {name: _random(record, case, generator) for name, record in signature.inputs.items()}


def prepare_feeds(signature: Signature, case: Case, feeds: Arrays) -> Arrays:
    """Inputs of the prepare graph, equal to the transformer's `feeds` where both take them."""
    made = random_feeds(signature, case)
    return {name: feeds.get(name, value) for name, value in made.items()}


def random_ids(signature: Signature, case: Case, config: Any) -> Arrays:
    """Ids of the vocabulary, with an end token somewhere, which CLIP's pooling looks for."""
    ((name, record),) = signature.inputs.items()
    shape = record.resolved(case.symbols)
    generator = np.random.default_rng(case.seed)
    ids = generator.integers(0, config.vocab_size, shape)
    ids[np.arange(shape[0]), generator.integers(0, shape[1], shape[0])] = config.eos_token_id
    return {name: ids}


def with_prepared(signature: Signature, feeds: Arrays, made: Mapping[str, Array]) -> Arrays:
    """`feeds` of the transformer with the position tables that a prepare graph made."""
    tables = [n for n, record in signature.inputs.items() if record.role == "prepared"]
    return {**feeds, **{name: made[name] for name in tables}}


def _random(record: TensorRecord, case: Case, generator: np.random.Generator) -> Array:
    shape = record.resolved(case.symbols)
    if record.role == "timestep":
        return generator.uniform(0, case.largest_timestep, shape).astype(record.dtype)
    if record.role == "guidance_scale":
        return generator.uniform(1, 6, shape).astype(record.dtype)
    if record.role == "text_mask":
        lengths = generator.integers(1, shape[1] + 1, (shape[0], 1))
        return (np.arange(shape[1]) < lengths).astype(record.dtype)
    return generator.standard_normal(shape).astype(record.dtype)
