"""Encoded prompts: what a network is fed besides its latent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from meancache_trt.errors import InputError
from meancache_trt.meancache.files import write_tensors


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: tensors by transformer input name, batch first, masks among them.

    `encoder_digest` is the SHA-256 of what encoded them (`encoding.encoder_digest`), None where
    that is not known.
    """

    prompts: tuple[str, ...]
    tensors: Mapping[str, NDArray[Any]]
    encoder_digest: str | None = None

    def select(self, index: int) -> Conditioning:
        """One of the prompts, as a batch of one."""
        tensors = {name: tensor[index : index + 1] for name, tensor in self.tensors.items()}
        return Conditioning((self.prompts[index],), tensors, self.encoder_digest)

    def followed_by(self, other: Conditioning) -> Conditioning:
        """These prompts and then the others, along the batch.

        Raises `InputError` where the two were encoded for different models or text lengths.
        """
        if self._shapes() != other._shapes():
            raise InputError(
                f"expected embeddings of one kind, found {self._shapes()} and {other._shapes()}; "
                "encode prompts and negative prompts with the same bundle"
            )
        pairs = {name: (own, other.tensors[name]) for name, own in self.tensors.items()}
        tensors = {name: np.concatenate(pair) for name, pair in pairs.items()}
        digest = self.encoder_digest if self.encoder_digest == other.encoder_digest else None
        return Conditioning(self.prompts + other.prompts, tensors, digest)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape[1:] for name, tensor in sorted(self.tensors.items())}

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, atomically."""
        metadata = {"prompts": json.dumps(self.prompts)}
        if self.encoder_digest is not None:
            metadata["encoder_digest"] = self.encoder_digest
        write_tensors(Path(path), self.tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote. Raises `InputError` where it is something else."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                prompts = msgspec.json.decode(metadata["prompts"], type=list[str])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"cannot read embeddings from {path}: {error}; make the file with "
                "`meancache-trt encode`"
            ) from error
        if not prompts or any(len(tensor) != len(prompts) for tensor in tensors.values()):
            raise InputError(
                f"expected as many embeddings as prompts in {path}, at least one, found "
                f"{len(prompts)} prompts; make the file with `meancache-trt encode`"
            )
        return cls(tuple(prompts), tensors, metadata.get("encoder_digest"))


def joined(samples: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """One batch of samples: the prompts of all, then the negative prompts of all where they have.

    Each sample's tensors are (1, ...), or (2, ...) with its negative prompt last.
    """
    tensors = {}
    for name in samples[0]:
        stacked = np.stack([sample[name] for sample in samples], axis=1)
        tensors[name] = stacked.reshape(-1, *stacked.shape[2:])
    return tensors


def paired(positive: Conditioning, negative: Conditioning) -> list[Conditioning]:
    """For each prompt itself and its negative prompt, as classifier-free guidance is fed.

    Raises `InputError` where there is neither one negative prompt for all nor one for each.
    """
    wanted, found = len(positive.prompts), len(negative.prompts)
    if found not in (1, wanted):
        raise InputError(
            f"{wanted} prompts need {wanted} negative prompts or a single one, found {found}"
        )
    return [
        positive.select(index).followed_by(negative.select(index % found))
        for index in range(wanted)
    ]
