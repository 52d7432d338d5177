"""A bundle's transformer in the place of a diffusers pipeline's own.

    pipe = FluxPipeline.from_pretrained(MODEL, transformer=None)
    pipe.transformer = EngineTransformer.load("flux.mcb")
    image = pipe("a red fox").images[0]

Everything else is the pipeline's: image-to-image and inpainting, callbacks, schedulers, output
types. This module imports torch and diffusers; import it where it is used.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from meancache_trt.bundle import Bundle
from meancache_trt.engine.cuda.device import ALIGNMENT_BYTES
from meancache_trt.engine.probe import Gpu
from meancache_trt.engine.select import check_backend, open_runtime
from meancache_trt.errors import BundleError, InputError
from meancache_trt.export.job import PIPELINE_FOLDER
from meancache_trt.export.registry import FAMILIES
from meancache_trt.manifest import TensorRecord
from meancache_trt.meancache.files import read_bytes
from meancache_trt.meancache.runtime import Runtime

_TABLES_KEPT = 2
"""A prompt and a negative prompt of another length need two. FLUX's take 5 MB at 1024 x 1024,
HunyuanVideo's 120 MB at 720 x 1280 and 129 frames."""

Tensors = dict[str, torch.Tensor]


class EngineTransformer:
    """A stand-in for the diffusers transformer of a bundle's family. Not thread-safe.

    It is called as the diffusers class is, with any batch, size, text length and positions, and
    computes in the graph's precision: inputs are cast to it, the result to the dtype of
    `hidden_states`. What is contiguous and of the right dtype already is not copied on its way in,
    and nothing is on its way out. There are no gradients. What acts inside the network is refused
    (a LoRA scale, ControlNet samples, IP-Adapter embeddings); the weights are the bundle's, with
    the LoRAs that were merged into it and no other that the transformer had that this replaces.

    Args:
        bundle: opened.
        part: "transformer", or "transformer_2" of a bundle with a second stage.
        runtime: what executes the graph; the caller closes it. By default one is opened.
        backend: which one to open: "auto" or a name that `meancache-trt doctor` lists.
        threads: cores that it may use; 0 means all.
        gpu: what `check_backend` found for that backend, so that the driver is not asked again.

    Attributes:
        config: that of the checkpoint's transformer, as diffusers has it, with every default.
        dtype: what the graph takes its latent in.
        in_channels: the configuration's, which some pipelines read from the module itself.
        device: where the runtime computes; tensors from elsewhere are copied there and back.

    Raises:
        BundleError: where the bundle has no such part, or the runtime cannot load the graph.
        RuntimeUnavailableError: where the backend cannot run here.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        part: str = "transformer",
        runtime: Runtime | None = None,
        backend: str = "auto",
        threads: int = 0,
        gpu: Gpu | None = None,
    ) -> None:
        _check_part(bundle, part)
        self.bundle = bundle
        self._family = FAMILIES[bundle.export.family]
        self._wrapper = self._family.wrapper()
        module = getattr(diffusers, self._family.transformer_class)
        self._signature = _without_self(inspect.signature(module.forward))
        self.config = _config(module, bundle, part)
        self.in_channels: int = self.config["in_channels"]
        self._configs = {"transformer": self.config}
        self._is_owner = runtime is None
        self._runtime = runtime or open_runtime(backend, bundle=bundle, threads=threads, gpu=gpu)
        _, self._component = bundle.export.component_in(part, self._runtime.precisions)
        self._graph = self._runtime.load(bundle.component_path(self._component))
        self._tables: dict[Hashable, Tensors] = {}
        self.device = torch.device(self._runtime.device)
        self.dtype = _torch_dtype(self._component.inputs["hidden_states"])

    @classmethod
    def load(
        cls,
        bundle: Path | str,
        *,
        part: str = "transformer",
        backend: str = "auto",
        threads: int = 0,
        is_full_check: bool = False,
    ) -> Self:
        """Open a bundle's directory and its transformer; see the class.

        Args:
            bundle: the directory.
            part: see the class.
            backend: see the class.
            threads: see the class.
            is_full_check: hash the weights even where their size and times are unchanged.

        Raises:
            BundleError: where it is damaged or no bundle.
            RuntimeUnavailableError: where the backend cannot run here.
        """
        gpu = check_backend(backend)  # before anything is read and hashed
        opened = Bundle.open(bundle, is_full_check=is_full_check)
        return cls(opened, part=part, backend=backend, threads=threads, gpu=gpu)

    def __enter__(self) -> Self:
        if self._is_owner:
            self._runtime.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_owner:
            self._runtime.__exit__(kind, error, trace)

    # Names are checked against diffusers' own signature, so that one which a later version adds is
    # refused here and not dropped.
    def __call__(self, *arguments: Any, **named: Any) -> Transformer2DModelOutput | tuple[Any, ...]:
        """The velocity, by the arguments of the diffusers class's `forward`.

        Returns:
            `Transformer2DModelOutput`, or a tuple of one where `return_dict` is False.

        Raises:
            InputError: for arguments that diffusers would refuse, or that the graph cannot follow.
            RenderError: where the runtime cannot take a tensor.
        """
        given = self._given(arguments, named)
        is_wrapped = given.pop("return_dict", True)
        values = self._values(given)
        latent = values["hidden_states"]
        velocity = self._run(self._inputs(values, given)).to(latent.device, latent.dtype)
        sample = self._family.module_output(velocity)
        return Transformer2DModelOutput(sample=sample) if is_wrapped else (sample,)

    forward = __call__

    def cache_context(
        self,
        name: str,  # noqa: ARG002
        **state: Any,  # noqa: ARG002
    ) -> contextlib.AbstractContextManager[None]:
        """Do nothing: diffusers' caches, which tell branches of guidance apart, are not in use."""
        return contextlib.nullcontext()

    def _given(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, without those that leave the network as it is."""
        try:
            bound = self._signature.bind(*arguments, **named).arguments
        except TypeError as error:
            raise InputError(
                f"the transformer of {self.bundle.directory} is called as a "
                f"{self._family.transformer_class}: {error}; use it in a pipeline that has one, "
                f"such as {self._family.pipelines[0]}"
            ) from error
        defaults = self._signature.parameters
        return {
            name: value
            for name, value in bound.items()
            if not (value is None or value is defaults[name].default or _is_empty(value))
        }

    def _values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What was given for each of the graph's inputs, but positions."""
        positions = self._wrapper.POSITION_ARGUMENTS
        values = {name: value for name, value in given.items() if name not in positions}
        values = self._wrapper.graph_inputs(self._configs, values)
        self._check_names(values, given)
        return values

    def _inputs(self, values: Mapping[str, Any], given: Mapping[str, Any]) -> Tensors:
        """A tensor for each of the graph's inputs, ready to bind."""
        inputs = {name: self._placed(name, value) for name, value in values.items()}
        return {**self._masks(inputs), **inputs, **self._position_tables(given)}

    def _check_names(self, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        records = self._component.inputs
        needed = {
            n for n, record in records.items() if record.role not in ("prepared", "text_mask")
        }
        needed.update(self._wrapper.POSITION_ARGUMENTS)
        unknown = sorted(inputs.keys() - records.keys())
        missing = sorted(needed - inputs.keys() - given.keys())
        if unknown or missing:
            raise InputError(
                f"the graph of {self.bundle.directory} needs {', '.join(sorted(needed))}: missing "
                f"{', '.join(missing) or 'nothing'}, not followed {', '.join(unknown) or 'nothing'}"
                "; for LoRA scales, ControlNet and IP-Adapters use the diffusers transformer"
            )

    def _masks(self, inputs: Tensors) -> Tensors:
        """Masks of ones, since no mask means that nothing is padded."""
        records = self._component.inputs
        sizes = _sizes(records, inputs)
        return {
            name: torch.ones(record.resolved(sizes), dtype=_torch_dtype(record), device=self.device)
            for name, record in records.items()
            if record.role == "text_mask" and name not in inputs
        }

    def _position_tables(self, given: Mapping[str, Any]) -> Tensors:
        """The tables of these positions; those of the last calls are kept."""
        positions = self._wrapper.positions(given)
        key = tuple(map(_contents, positions))
        if key not in self._tables:
            made = self._wrapper.position_tables(self._configs, *positions)
            if len(self._tables) == _TABLES_KEPT:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = {name: self._placed(name, table) for name, table in made.items()}
        return self._tables[key]

    def _placed(self, name: str, value: Any) -> torch.Tensor:
        """The value where and as the runtime takes it; itself where it is so already."""
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} is a tensor, found {type(value).__name__}")
        if value.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{name} requires a gradient, which an engine has none of; call it under "
                "torch.no_grad(), as diffusers pipelines do"
            )
        dtype = _torch_dtype(self._component.inputs[name])
        placed = value.detach().to(self.device, dtype).contiguous()
        # A part of a tensor may begin anywhere; TensorRT takes aligned addresses only.
        is_skewed = self.device.type == "cuda" and placed.data_ptr() % ALIGNMENT_BYTES
        return placed.clone() if is_skewed else placed

    def _run(self, inputs: Tensors) -> torch.Tensor:
        # Bound anew at each call: pipelines hand over other memory each time, and both velocities
        # of guidance are alive at once. In ONNX Runtime it costs 0.1 ms for FLUX's eight tensors,
        # where one evaluation of the small stand-in takes 4.
        name = self._component.output_named("velocity")
        record = self._component.outputs[name]
        shape = record.resolved(_sizes(self._component.inputs, inputs))
        velocity = torch.empty(shape, dtype=_torch_dtype(record), device=self.device)
        tensors = {**inputs, name: velocity}
        runtime = self._runtime
        bound = {key: runtime.from_dlpack(tensor) for key, tensor in tensors.items()}
        self._graph.bind(bound).enqueue()
        runtime.synchronize()
        return velocity


def _check_part(bundle: Bundle, part: str) -> None:
    known = bundle.export.transformers
    if part not in known:
        raise BundleError(
            f"expected one of the bundle's networks, {', '.join(known)}, found {part!r}; a bundle "
            "has a transformer_2 where its model has a second stage"
        )


def _config(module: Any, bundle: Bundle, part: str) -> FrozenDict:
    """The checkpoint's configuration, with the defaults of what it leaves out."""
    path = bundle.directory / PIPELINE_FOLDER / part / "config.json"
    parameters = inspect.signature(module).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    return FrozenDict({**defaults, **json.loads(read_bytes(path))})


def _without_self(method: inspect.Signature) -> inspect.Signature:
    return method.replace(parameters=list(method.parameters.values())[1:])


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _torch_dtype(record: TensorRecord) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, record.dtype)
    return dtype


def _contents(value: Any) -> Hashable:
    """What two tensors of equal contents have in common; any other value is its own."""
    if not isinstance(value, torch.Tensor):
        key: Hashable = value
        return key
    return tuple(value.shape), value.detach().cpu().numpy().tobytes()


def _sizes(records: Mapping[str, TensorRecord], tensors: Tensors) -> dict[str, int]:
    """The size of each symbol. Raises `InputError` where two tensors disagree about one."""
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        expected, found = records[name].shape, tuple(tensor.shape)
        if len(expected) == len(found):
            symbols = zip(expected, found, strict=True)
            sizes = {**{s: size for s, size in symbols if isinstance(s, str)}, **sizes}
        if len(expected) != len(found) or records[name].resolved(sizes) != found:
            raise InputError(
                f"{name} has shape {found}, expected {expected}, where those before it have "
                f"{sizes or 'no sizes'}"
            )
    return sizes
