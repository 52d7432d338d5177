"""What a model family is: data, shape functions, and a late-imported wrapper.

A new model is one `Family` (torch-free, here called the spec) and one `Wrapper` (a module of
functions that may import torch and diffusers), listed in `meancache_trt.export.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec

from meancache_trt.errors import ExportError, InputError
from meancache_trt.manifest import (
    GridRule,
    Guidance,
    Resolution,
    Role,
    TensorRecord,
    Tiling,
    check_guidance,
)
from meancache_trt.meancache.sigmas import MuRule, SecondStage

if TYPE_CHECKING:
    import torch

Configs = Mapping[str, Mapping[str, Any]]
"""Component name in model_index.json -> its JSON configuration; "model_index" is that file."""


@dataclass(frozen=True)
class Size:
    """What a user chooses: pixels, text tokens, and frames for video."""

    height: int
    width: int
    text_tokens: int
    frames: int | None = None


@dataclass(frozen=True)
class FrameRule:
    """How long a video may be: 1 + a multiple of `stride` frames, at most `longest`.

    `default` is what the family's pipeline makes, `per_second` what the model was trained at.
    """

    stride: int
    longest: int
    default: int
    per_second: float


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


@dataclass(frozen=True)
class TextGraph:
    """A text encoder of transformers that becomes a graph beside its weights.

    `component` and `tokenizer` are folders of the checkpoint, `encoder_class` is transformers'. The
    `signature` has the token ids as its input, as many as prompts are cut and padded to, and as its
    output `field` of what the encoder returns, under the transformer's name for it. `blocks` is as
    in `Family`.
    `former_prefix` is what checkpoints of older versions have before each tensor's name.
    `is_float16_safe` is off where activations exceed float16.
    """

    component: str
    tokenizer: str
    encoder_class: str
    field: str
    signature: Callable[[Configs], Signature]
    blocks: tuple[str, ...]
    former_prefix: str = ""
    is_float16_safe: bool = True


class Wrapper(Protocol):
    """The part of a family that needs torch.

    The first three give modules to trace; their `forward` takes the signature's inputs by name
    and returns its outputs in order. The next three are the oracle that parity compares with:
    diffusers' own code, unpatched. All tensors are on the CPU. The last four let a graph stand in
    for the diffusers transformer; `configs` then has "transformer" alone, with every default.
    """

    def transformer_graph(
        self, network: torch.nn.Module
    ) -> AbstractContextManager[torch.nn.Module]:
        """The transformer with prepared tables as inputs; leaving restores `network`."""

    def prepare_graph(self, network: torch.nn.Module, configs: Configs) -> torch.nn.Module:
        """Noise to the loop's latent and the tables that depend on sizes only."""

    def decoder_graph(self, vae: torch.nn.Module) -> torch.nn.Module:
        """The loop's latent to pictures or videos, black 0 and white 1, not clipped.

        In one piece: where diffusers would decode in tiles, hosts call it for each tile.
        """

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

    def encode_prompts(
        self, pipeline: Any, prompts: Sequence[str], text_tokens: int
    ) -> dict[str, torch.Tensor]:
        """Conditioning tensors by transformer input name, batch first.

        `pipeline` is diffusers', with its text encoders alone.
        """

    POSITION_ARGUMENTS: tuple[str, ...]
    """Arguments of the diffusers transformer's `forward` that only say where tokens are."""

    def graph_inputs(self, configs: Configs, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What `forward` was given, but positions, as the graph's inputs, by name.

        In the graph's units, and without what the module never reads. Arguments that are not
        inputs of the graph are left in: the caller refuses them.
        """

    def positions(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the position tables depend on: tensors on any device, and hashable values."""

    def position_tables(self, configs: Configs, *positions: Any) -> dict[str, torch.Tensor]:
        """The transformer graph's `prepared` inputs, by diffusers' own embedding, on the CPU."""


@dataclass(frozen=True)
class Family:
    """A model family as data.

    `pipelines` are the `_class_name`s of model_index.json that mean this family; the classes
    are diffusers'. `text_components` are what prompts are encoded with, `text_graphs` those
    of them that become graphs. `multiple` is what
    height and width are multiples of, `longest_side` the largest of either, `default_side` what
    the model was trained at, all in pixels.
    `blocks` names the transformer's lists of repeated blocks.
    `guidance_argument` and `text_tokens_argument` are what the diffusers pipeline calls them.
    `symbols` gives every symbol of the signatures but those of `manifest.batch_symbols`; one is
    `text_tokens`, on which no other depends where text has a mask, so that hosts can shorten it by
    that alone. `grid`, `mu` and `timestep_scale` are explained in `manifest.Exported`. `frames` is
    None for families of pictures. `longest_text_tokens` is what the pipeline refuses to exceed, if
    anything. `tiling` says in which tiles the VAE class decodes; None where it has none.
    `float16_overflow` is where it was reported that the network's activations exceed float16.
    `module_output` makes of the graph's velocity what the transformer's `forward` gives, where that
    has another sign or layout, and `latents_argument` of the loop's latent what the pipeline takes
    as `latents`. `second_stage` says from which timestep on the pipeline evaluates its
    transformer_2; None, also as its result, where there is one transformer.
    """

    name: str
    pipelines: tuple[str, ...]
    transformer_class: str
    blocks: tuple[str, ...]
    vae_class: str
    text_components: tuple[str, ...]
    grid: GridRule
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
    frames: Callable[[Configs], FrameRule] | None = None
    longest_text_tokens: int | None = None
    float16_overflow: str | None = None
    tiling: Callable[[Configs], Tiling] | None = None
    text_graphs: tuple[TextGraph, ...] = ()
    module_output: Callable[[Any], Any] = lambda velocity: velocity
    latents_argument: Callable[[Any, Resolution], Any] = lambda latent, _: latent
    mu: MuRule = "line"
    second_stage: Callable[[Configs], SecondStage | None] | None = None

    def wrapper(self) -> Wrapper:
        """The module beside the spec that has its name and `_torch`, imported at the first call."""
        return cast("Wrapper", import_module(f"meancache_trt.export.{self.name}_torch"))


def second_stage(
    family: Family, configs: Configs, guidance_scale: float | None
) -> SecondStage | None:
    """The pipeline's second stage, guided by `guidance_scale`; None where it has none.

    Raises `InputError` for a scale without a stage, or that the model cannot take.
    """
    check_guidance(family.guidance(configs), guidance_scale)
    found = family.second_stage(configs) if family.second_stage else None
    if guidance_scale is None:
        return found
    if found is None:
        raise InputError(
            "a model of one transformer has one guidance scale, found a second, "
            f"{guidance_scale:g}; leave it out"
        )
    return msgspec.structs.replace(found, guidance_scale=guidance_scale)


def check_size(family: Family, configs: Configs, size: Size) -> None:
    """Raise `InputError` for a size that the family cannot take, naming the nearest valid ones."""
    multiple, longest = family.multiple(configs), family.longest_side(configs)
    for name, pixels in (("height", size.height), ("width", size.width)):
        if pixels < multiple or pixels % multiple or pixels > longest:
            raise InputError(_size_message(name, pixels, multiple, longest))
    if size.text_tokens < 1:
        raise InputError(f"text_tokens is {size.text_tokens}; expected at least 1")
    longest = family.longest_text_tokens or size.text_tokens
    if size.text_tokens > longest:
        raise InputError(f"text_tokens is {size.text_tokens}; expected at most {longest}")
    if family.frames is not None:
        _check_frames(family.frames(configs), size.frames)
    elif size.frames is not None:
        raise InputError(
            f"frames is {size.frames}, but the {family.name} family makes pictures; leave it out"
        )


def _check_frames(rule: FrameRule, frames: int | None) -> None:
    if frames is None:
        raise InputError(f"a video needs a number of frames, such as {rule.default}")
    if frames < 1 or frames > rule.longest or (frames - 1) % rule.stride:
        below = min(max(frames - 1, 0) // rule.stride * rule.stride + 1, rule.longest)
        above = min(below + rule.stride, rule.longest)
        nearest = f"{below}" if frames < 1 or below == above else f"{below} or {above}"
        raise InputError(
            f"frames is {frames}; this checkpoint makes 1 + a multiple of {rule.stride} frames, at "
            f"most {rule.longest}; use {nearest}"
        )


def _size_message(name: str, pixels: int, multiple: int, longest: int) -> str:
    below = min(max(pixels // multiple, 1) * multiple, longest)
    above = min(below + multiple, longest)
    nearest = f"{below}" if pixels < below or below == above else f"{below} or {above}"
    return (
        f"{name} is {pixels}; this checkpoint needs a multiple of {multiple} pixels between "
        f"{multiple} and {longest}; use {nearest}"
    )


def default_frames(family: Family, configs: Configs) -> int | None:
    """The frames that the family's pipeline makes; None in a family of pictures."""
    return family.frames(configs).default if family.frames is not None else None


def frame_count(family: Family, configs: Configs, latent_frames: int) -> int | None:
    """The frames that so many latent frames decode to; None in a family of pictures."""
    if family.frames is None:
        return None
    return (latent_frames - 1) * family.frames(configs).stride + 1


def setting(configs: Configs, component: str, key: str) -> Any:
    """A value that a component's config.json must have; `ExportError` where it does not."""
    if key not in configs[component]:
        raise ExportError(f"{component}/config.json lacks {key!r}; download the checkpoint again")
    return configs[component][key]


def float32(role: Role, *shape: int | str) -> TensorRecord:
    """The record of a float32 tensor."""
    return TensorRecord(dtype="float32", shape=shape, role=role)


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
    return record.resolved({**symbols, "batch": 1})[1:]
