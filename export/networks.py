"""The models of a checkpoint that become graphs: without weights to trace, with them as oracles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import diffusers
from torch import nn

from meancache_trt.errors import ExportError
from meancache_trt.export.checkpoint import check_tensors
from meancache_trt.export.encoders import (
    EncoderModule,
    build_encoder,
    load_encoder,
    named_as_in_module,
)
from meancache_trt.export.family import Signature, TextGraph
from meancache_trt.export.job import PIPELINE_FOLDER, Job, Precision
from meancache_trt.export.lora_merge import merge_into
from meancache_trt.export.safetensors_file import StoredTensor, read_tensors
from meancache_trt.export.trace import build_network, cast_stored


@dataclass(frozen=True)
class Network(ABC):
    """A model of the checkpoint, and the graph with weights that is made of it.

    `part` is its folder in the checkpoint, `component` the graph's name, and `folder` where graph
    and weights lie in the bundle. `blocks` names its lists of repeated blocks.
    """

    job: Job
    part: str
    component: str
    folder: str
    signature: Signature
    blocks: tuple[str, ...]

    @abstractmethod
    def empty(self, dtype: str) -> nn.Module:
        """The model with its parameters on the meta device."""

    @abstractmethod
    def load(self) -> nn.Module:
        """The model with its weights, as its own library loads it, in float32 on the CPU."""

    @abstractmethod
    def traceable(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The module to trace; leaving restores `model`."""

    def sample(self, lists: Sequence[str] | None = None) -> tuple[nn.Module, tuple[str, ...]]:
        """`empty` in float32 with the first of each kind of block alone, and their names.

        Blocks of a list are of a kind where they have parameters of the same names and shapes. Of
        other lists than `lists`, where given, there is none.
        """
        network, kept = self.empty("float32"), []
        for name in self.blocks:
            blocks, kinds = network.get_submodule(name), set[object]()
            is_wanted = lists is None or name in lists
            for number, block in list(blocks.named_children()):
                kind = tuple((key, value.shape) for key, value in block.state_dict().items())
                if kind in kinds or not is_wanted:
                    delattr(blocks, number)  # which leaves the others their numbers
                else:
                    kinds.add(kind)
                    kept.append(f"{name}.{number}")
        return network, tuple(kept)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """In which the graph is made."""
        return self.job.precisions

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The weights by the names that the model has for them, as LoRAs left them."""
        stored, overlay = self.job.source.tensors(self.part), self.job.overlays.get(self.part)
        return stored if overlay is None else {**stored, **read_tensors(overlay)}

    @property
    def directory(self) -> Path:
        return self.job.source.path / self.part

    def check(self) -> None:
        """Raise `ExportError` unless the weights are those that the configuration leads to."""
        state = self.empty("float32").state_dict()
        check_tensors(self.part, self.tensors, {n: tuple(v.shape) for n, v in state.items()})


class _DiffusersNetwork(Network):
    def empty(self, dtype: str) -> nn.Module:
        return cast_stored(deepcopy(self._built), dtype)

    @cached_property
    def _built(self) -> nn.Module:
        # Once: SD3.5-medium computes a table of 147,456 positions, which its checkpoint replaces.
        return build_network(self._class_name, self.job.configs[self.part])

    def load(self) -> nn.Module:
        kind = getattr(diffusers, self._class_name)
        loaded: nn.Module = kind.from_pretrained(self.directory, local_files_only=True)
        network = loaded.float().eval().requires_grad_(False)
        if self.part in self.job.overlays:
            merge_into(network, self.job.source, self.part)
        return network

    @property
    @abstractmethod
    def _class_name(self) -> str: ...


class Transformer(_DiffusersNetwork):
    """A network that is evaluated at nodes."""

    @property
    def _class_name(self) -> str:
        return self.job.family.transformer_class

    def traceable(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        return self.job.family.wrapper().transformer_graph(model)


class VaeDecoder(_DiffusersNetwork):
    """The VAE, of which the decoder becomes a graph."""

    @property
    def _class_name(self) -> str:
        return self.job.family.vae_class

    def traceable(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.job.family.wrapper().decoder_graph(model))


@dataclass(frozen=True)
class TextEncoder(Network):
    """A text encoder that becomes a graph beside its weights, which a bundle has anyway."""

    text: TextGraph

    def empty(self, dtype: str) -> nn.Module:
        return build_encoder(self.text.encoder_class, self.directory, dtype)

    def load(self) -> nn.Module:
        return load_encoder(self.text, self.job.source.path)

    def traceable(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        return nullcontext(EncoderModule(model, self.text.field))

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """In which the graph is made; float16 is left out where activations exceed it."""
        asked = self.job.precisions
        return tuple(p for p in asked if self.text.is_float16_safe or p.dtype != "float16")

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        stored = self.job.source.tensors(self.part)
        return named_as_in_module(stored, self.empty("float32"), self.text.former_prefix)

    def check(self) -> None:
        found = self.job.source.index.get(self.part)
        if found != ["transformers", self.text.encoder_class]:
            raise ExportError(
                f"{self.part} is {found} in model_index.json; expected {self.text.encoder_class} "
                f"of transformers, as the {self.job.family.name} family has; use an unmodified "
                "checkpoint"
            )
        super().check()


def transformers(job: Job) -> list[Transformer]:
    """The job's transformers, of one signature."""
    signature = job.family.signatures(job.configs).transformer
    return [
        Transformer(job, name, name, name, signature, job.family.blocks)
        for name in job.transformers
    ]


def vae_decoder(job: Job) -> VaeDecoder:
    """The job's VAE."""
    signature = job.family.signatures(job.configs).vae_decoder
    return VaeDecoder(job, "vae", "vae_decoder", "vae_decoder", signature, ())


def text_encoders(job: Job) -> list[TextEncoder]:
    """The job's text encoders that become graphs."""
    return [
        TextEncoder(
            job,
            text.component,
            text.component,
            f"{PIPELINE_FOLDER}/{text.component}",
            text.signature(job.configs),
            text.blocks,
            text,
        )
        for text in job.family.text_graphs
    ]
