"""What a model family is: data, shape functions, and a late-imported wrapper.

A new model is one `Family` (torch-free, here called the spec) and one `Wrapper` (a module of
functions that may import torch and diffusers), listed in `meancache_trt.export.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from meancache_trt.errors import InputError
from meancache_trt.manifest import Guidance, Resolution, TensorRecord

if TYPE_CHECKING:
    import torch

Configs = Mapping[str, Mapping[str, Any]]
"""Component name in model_index.json -> its JSON configuration."""


@dataclass(frozen=True)
class Size:
    """What a user chooses: pixels, text tokens, and frames for video."""

    height: int
    width: int
    text_tokens: int
    frames: int | None = None


@dataclass(frozen=True)
class Signature:
    """Names, dtypes, symbolic shapes and roles of a graph's inputs and outputs, in order."""

    inputs: dict[str, TensorRecord]
    outputs: dict[str, TensorRecord]


@dataclass(frozen=True)
class Signatures:
    """The graphs whose weights or shapes come from the checkpoint."""

    transformer: Signature
    prepare: Signature
    vae_decoder: Signature


class Wrapper(Protocol):
    """The part of a family that needs torch.

    The first three give modules to trace; their `forward` takes the signature's inputs by name
    and returns its outputs in order. The next three are the oracle that parity compares with:
    diffusers' own code, unpatched. All tensors are on the CPU.
    """

    def transformer_graph(
        self, network: torch.nn.Module
    ) -> AbstractContextManager[torch.nn.Module]:
        """The transformer with prepared tables as inputs; leaving restores `network`."""

    def prepare_graph(self, network: torch.nn.Module, configs: Configs) -> torch.nn.Module:
        """Noise to packed latent and the tables that depend on sizes only."""

    def decoder_graph(self, vae: torch.nn.Module) -> torch.nn.Module:
        """Packed latent to pictures in [0, 1]."""

    def reference_velocity(
        self,
        network: torch.nn.Module,
        feeds: Mapping[str, torch.Tensor],
        symbols: Mapping[str, int],
    ) -> torch.Tensor: ...

    def reference_preparation(
        self,
        network: torch.nn.Module,
        feeds: Mapping[str, torch.Tensor],
        symbols: Mapping[str, int],
    ) -> dict[str, torch.Tensor]: ...

    def reference_image(
        self, vae: torch.nn.Module, latent: torch.Tensor, symbols: Mapping[str, int]
    ) -> torch.Tensor: ...

    def load_text_pipeline(self, directory: str) -> Any:
        """The diffusers pipeline of a folder, with its text encoders alone, in float32."""

    def encode_prompts(
        self, pipeline: Any, prompts: Sequence[str], text_tokens: int
    ) -> dict[str, torch.Tensor]:
        """Conditioning tensors by transformer input name, batch first."""


@dataclass(frozen=True)
class Family:
    """A model family as data.

    `pipelines` are the `_class_name`s of model_index.json that mean this family; the classes
    are diffusers'. `text_components` are what prompts are encoded with. `multiple` is what
    height and width are multiples of, `longest_side` the largest of either, `default_side` what
    the model was trained at, all in pixels.
    `guidance_argument` and `text_tokens_argument` are what the diffusers pipeline calls them.
    `symbols` gives every symbol of the signatures but the batch. `grid` and `timestep_scale` are
    explained in `meancache_trt.manifest.Exported`.
    """

    name: str
    pipelines: tuple[str, ...]
    transformer_class: str
    vae_class: str
    text_components: tuple[str, ...]
    grid: Literal["linspace", "count"]
    timestep_scale: float
    guidance_argument: str
    text_tokens_argument: str | None
    guidance: Callable[[Configs], Guidance]
    default_text_tokens: Callable[[Configs], int]
    multiple: Callable[[Configs], int]
    longest_side: Callable[[Configs], int]
    default_side: Callable[[Configs], int]
    symbols: Callable[[Configs, Size], dict[str, int]]
    signatures: Callable[[Configs], Signatures]
    wrapper: Callable[[], Wrapper]


def check_size(family: Family, configs: Configs, size: Size) -> None:
    """Raise `InputError` for a size that the family cannot take, naming the nearest valid ones."""
    multiple, longest = family.multiple(configs), family.longest_side(configs)
    for name, pixels in (("height", size.height), ("width", size.width)):
        if pixels < multiple or pixels % multiple or pixels > longest:
            raise InputError(_size_message(name, pixels, multiple, longest))
    if size.text_tokens < 1:
        raise InputError(f"text_tokens is {size.text_tokens}; expected at least 1")


def _size_message(name: str, pixels: int, multiple: int, longest: int) -> str:
    below = min(max(pixels // multiple, 1) * multiple, longest)
    above = min(below + multiple, longest)
    nearest = f"{below}" if pixels < below or below == above else f"{below} or {above}"
    return (
        f"{name} is {pixels}; this checkpoint needs a multiple of {multiple} pixels between "
        f"{multiple} and {longest}; use {nearest}"
    )


def resolved(record: TensorRecord, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The record's shape with its symbols replaced by their sizes."""
    return tuple(symbols[d] if isinstance(d, str) else d for d in record.shape)


def resolution(family: Family, configs: Configs, size: Size) -> Resolution:
    """The record of a size that `check_size` has passed."""
    symbols = family.symbols(configs, size)
    signatures = family.signatures(configs)
    return Resolution(
        height=size.height,
        width=size.width,
        frames=size.frames,
        symbols=symbols,
        noise_shape=_sample_shape(signatures.prepare.inputs, "noise", symbols),
        latent_shape=_sample_shape(signatures.prepare.outputs, "latent", symbols),
        decode_shape=_sample_shape(signatures.vae_decoder.inputs, "latent_grid", symbols),
    )


def _sample_shape(
    tensors: Mapping[str, TensorRecord], role: str, symbols: Mapping[str, int]
) -> tuple[int, ...]:
    record = next(record for record in tensors.values() if record.role == role)
    return resolved(record, {**symbols, "batch": 1})[1:]
