"""Prompts to conditioning: from the cache, else by the bundle's text graphs, else by torch.

Each prompt is encoded alone and once, so that its embedding does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meancache_trt.bundle import Bundle
from meancache_trt.conditioning import Conditioning, paired
from meancache_trt.embedding_cache import EmbeddingCache, RecentEmbeddings
from meancache_trt.errors import BundleError, InputError, RuntimeUnavailableError
from meancache_trt.export.job import PIPELINE_FOLDER
from meancache_trt.export.registry import FAMILIES
from meancache_trt.export.text import PromptEncoder, TextPrecision
from meancache_trt.graphs import Graphs
from meancache_trt.manifest import Component, TensorRecord
from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.runtime import Call, Runtime, Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tensors = dict[str, NDArray[Any]]

_KEY_VERSION = 1
"""Counted up where the same encoders would give the same prompt other tensors than before."""


def encoder_digest(bundle: Bundle) -> str:
    """SHA-256 over what prompts are encoded with: weights, tokenizers and their configurations.

    As in the checkpoint: graphs made of it are not part, so bundles with and without them agree.
    """
    parts = FAMILIES[bundle.export.family].text_components
    components = bundle.export.components.values()
    made = {component.path for component in components}
    made |= {part.tokenizer.path for part in components if part.tokenizer}
    folders = {PurePosixPath(PIPELINE_FOLDER, part) for part in parts}
    files = [
        (path, record.sha256)
        for path, record in sorted(bundle.manifest.files.items())
        if PurePosixPath(path).parent in folders and path not in made
    ]
    return digest_of(encode_json(files))


class BundleEncoder:
    """What encodes the prompts of a bundle; loads nothing before a prompt needs it.

    Text graphs run on the runtime of `graphs`, in float32. `precision` "checkpoint" has torch load
    the encoders in the dtype in which they are stored, also where there are text graphs: half the
    memory for most, and embeddings rounded accordingly. Without `keep_encoders` what encodes is
    freed before the network runs, and loaded again for the next prompt that is not in the cache.
    """

    def __init__(
        self,
        graphs: Graphs,
        *,
        precision: TextPrecision = "float32",
        cache: EmbeddingCache | None = None,
        keep_encoders: bool = True,
    ) -> None:
        export, directory = graphs.bundle.export, graphs.bundle.directory / PIPELINE_FOLDER
        self.digest = encoder_digest(graphs.bundle)
        self._is_guided = export.guidance.is_classifier_free
        self._symbols = export.resolution.symbols
        self._inputs = {
            name: record
            for name, record in export.components["transformer"].inputs.items()
            if record.role in ("conditioning", "text_mask")
        }
        self._cache = cache
        self._recent = RecentEmbeddings()
        self._keep_encoders = keep_encoders
        self._encoder: GraphEncoder | PromptEncoder
        text_graphs = export.text_graphs() if precision == "float32" else {}
        if text_graphs:
            runner = graphs.runtime.name
            self._encoder = GraphEncoder(graphs, list(text_graphs.values()))
        else:
            runner = f"torch {precision}"
            family = FAMILIES[export.family]
            self._encoder = PromptEncoder(family, directory, export.text_tokens, precision)
        self._kind = [_KEY_VERSION, export.family, self.digest, export.text_tokens, runner]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts, of which those in the cache need no encoder.

        Raises `InputError` for no prompts at all or one that is no Unicode, and what
        `GraphEncoder` and `PromptEncoder` do.
        """
        if isinstance(prompts, str):
            raise InputError(f"prompts are a list, found one text; give [{prompts!r}]")
        if not prompts:
            raise InputError("there are no prompts to encode; give at least one")
        for prompt in prompts:
            _check_unicode(prompt)
        made = {prompt: self._encoded(prompt) for prompt in dict.fromkeys(prompts)}
        tensors = {
            name: np.concatenate([made[prompt][name] for prompt in prompts])
            for name in made[prompts[0]]
        }
        return Conditioning(tuple(prompts), tensors, self.digest)

    def for_pictures(
        self,
        prompts: Sequence[str] | Conditioning,
        negative_prompt: str | Sequence[str] | Conditioning,
    ) -> list[Conditioning]:
        """What the network is fed for each picture, the negative prompt last where it takes one.

        Raises `InputError` for a negative prompt without effect, for as many as do not fit the
        prompts, and for embeddings that other encoders made.
        """
        if negative_prompt and not self._is_guided:
            raise InputError(
                "this model has no classifier-free guidance, so a negative prompt would have no "
                "effect; leave it out"
            )
        positive = self._conditioning(prompts)
        made = [positive.select(index) for index in range(len(positive.prompts))]
        if self._is_guided:
            texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
            made = paired(positive, self._conditioning(texts))
        if not self._keep_encoders:
            self._encoder.release()
        return made

    def _conditioning(self, prompts: Sequence[str] | Conditioning) -> Conditioning:
        if not isinstance(prompts, Conditioning):
            return self.encode(prompts)
        if prompts.encoder_digest not in (None, self.digest):
            raise InputError(
                f"expected embeddings of this bundle's encoders (digest {self.digest[:12]}), found "
                f"those of others (digest {str(prompts.encoder_digest)[:12]}); encode the prompts "
                "again with `meancache-trt encode` and this bundle"
            )
        self._check_shapes(prompts)
        return prompts

    def _check_shapes(self, conditioning: Conditioning) -> None:
        for name, record in self._inputs.items():
            tensor = conditioning.tensors.get(name)
            expected = record.resolved(self._symbols, skip=1)
            if tensor is None or tensor.shape[1:] != expected:
                found = "nothing" if tensor is None else tensor.shape[1:]
                length = self._symbols["text_tokens"]
                raise InputError(
                    f"expected embeddings {name} of shape {expected} a prompt, found {found}; this "
                    f"bundle takes {length} text tokens: encode the prompts with it"
                )

    def missing(self, prompts: Sequence[str]) -> int:
        """How many distinct prompts an encoder would have to run for; any thread may ask."""
        return sum(not self._is_known(self._key(prompt)) for prompt in set(prompts))

    def _is_known(self, key: str) -> bool:
        return key in self._recent or (self._cache is not None and key in self._cache)

    def _key(self, prompt: str) -> str:
        return digest_of(encode_json([*self._kind, prompt]))

    def _encoded(self, prompt: str) -> Tensors:
        key = self._key(prompt)
        known = self._recent.get(key)
        if known is not None:
            return known
        tensors = self._kept_or_made(key, prompt)
        self._recent.put(key, tensors)
        return tensors

    def _kept_or_made(self, key: str, prompt: str) -> Tensors:
        known = self._cache.get(key) if self._cache else None
        if known is not None:
            return known
        tensors = self._encoder.encode([prompt])
        if self._cache:
            self._cache.put(key, tensors)
        return tensors


def _check_unicode(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8
        raise InputError(
            f"the prompt {prompt!r} is not Unicode text: {error.reason} at character "
            f"{error.start}; give it in UTF-8"
        ) from error


@dataclass(frozen=True)
class _BoundGraph:
    runtime: Runtime
    tokenizer: Tokenizer
    ids: Tensor
    outputs: dict[str, Tensor]
    call: Call

    def run(self, prompt: str) -> Tensors:
        ids = self.tokenizer.encode(prompt).ids
        with self.runtime.turn():
            self.ids.write(np.array([ids], np.int64))
            self.call.enqueue()
        self.runtime.synchronize()
        with self.runtime.turn():
            return {name: tensor.read() for name, tensor in self.outputs.items()}


class GraphEncoder:
    """Prompts to conditioning by a bundle's text graphs, kept from the first use to `release`."""

    def __init__(self, graphs: Graphs, components: Sequence[Component]) -> None:
        self._graphs = graphs
        self._components = components
        self._bound: list[_BoundGraph] = []

    def encode(self, prompts: Sequence[str]) -> Tensors:
        """Conditioning by transformer input name, batch first, float32; prompts too long are cut.

        Raises `RuntimeUnavailableError` without the tokenizers library, `BundleError` where a
        graph or tokenizer cannot be loaded.
        """
        with self._graphs.runtime.turn():
            self._bound = self._bound or [self._bind(component) for component in self._components]
        made = [graph.run(prompt) for prompt in prompts for graph in self._bound]
        names = [name for graph in self._bound for name in graph.outputs]
        return {
            name: np.concatenate([tensors[name] for tensors in made if name in tensors])
            for name in names
        }

    def release(self) -> None:
        """Free the graphs; `encode` loads them again."""
        self._bound = []
        for component in self._components:
            self._graphs.drop(component)

    def _bind(self, component: Component) -> _BoundGraph:
        assert component.tokenizer is not None
        tokenizer = _load_tokenizer(str(self._graphs.bundle.directory / component.tokenizer.path))
        name = component.input_named("token_ids")
        length = component.tokenizer.length
        ids = self._zeros(component.inputs[name], length)
        outputs = {key: self._zeros(record, length) for key, record in component.outputs.items()}
        call = self._graphs.graph(component).bind({name: ids, **outputs})
        return _BoundGraph(self._graphs.runtime, tokenizer, ids, outputs, call)

    def _zeros(self, record: TensorRecord, text_tokens: int) -> Tensor:
        sizes = {"batch": 1, "text_tokens": text_tokens}
        return self._graphs.runtime.zeros(record.resolved(sizes), record.dtype)


def _load_tokenizer(path: str) -> Tokenizer:
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415  ready embeddings do without
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"encoding prompts needs the package tokenizers ({error}); install "
            "meancache-trt[cpu], or render from embeddings that were encoded before"
        ) from error
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing more precise
        raise BundleError(
            f"{path} cannot be read as a tokenizer: {error}; install the version of tokenizers "
            "that the bundle was built with, or build the bundle again"
        ) from error
