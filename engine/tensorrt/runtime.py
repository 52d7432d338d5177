"""TensorRT and TensorRT for RTX as a runtime: plans of one bundle on one GPU.

Every tensor, context and CUDA graph keeps its address from binding to the end, all work goes to
one stream in order, and the host waits only where it reads or is asked to.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from meancache_trt.bundle import Bundle
from meancache_trt.engine.binding import check_binding
from meancache_trt.engine.cuda.device import ALIGNMENT_BYTES, Device
from meancache_trt.engine.cuda.runtime import DeviceRuntime
from meancache_trt.engine.cuda.tensors import DeviceTensor
from meancache_trt.engine.probe import Gpu
from meancache_trt.engine.tensorrt.calls import BoundCall, CapturedSequence
from meancache_trt.engine.tensorrt.contexts import ActivationBlock, Context, Shapes
from meancache_trt.engine.tensorrt.engines import EngineLoader
from meancache_trt.engine.tensorrt.library import Flavour, Library, load_library
from meancache_trt.engine.tensorrt.needs import planned_precisions
from meancache_trt.engine.tensorrt.record import PlanRecord
from meancache_trt.engine.tensorrt.runtime_cache import RuntimeCache
from meancache_trt.errors import PlanMismatchError, RenderError
from meancache_trt.manifest import Component, TensorRecord
from meancache_trt.meancache.runtime import Call, Tensor, TensorSpec


class TensorRtRuntime(DeviceRuntime):
    """The plans of a bundle, of one flavour, on one GPU. Not thread-safe.

    Args:
        bundle: opened; `load` takes its graphs only.
        library: an imported flavour.
        device: the GPU, which the runtime closes.
        stream: a host's own to work on; see `Device.stream`.
        cache_directory: where kernels compiled at run time are kept; the user's by default.

    Attributes:
        precisions: see `Runtime.precisions`; those that there are plans for come first.
    """

    def __init__(
        self,
        bundle: Bundle,
        library: Library,
        device: Device,
        *,
        stream: object | None = None,
        cache_directory: Path | None = None,
    ) -> None:
        super().__init__(device, stream)
        self.name: str = library.flavour
        self.version = library.version
        self.precisions = planned_precisions(bundle, library, device.compute_capability)
        cache = RuntimeCache(library, device.product, device.compute_capability, cache_directory)
        self._loader = EngineLoader(bundle, library, device, cache)
        self._begin()

    def _begin(self) -> None:
        self.block = ActivationBlock(self.cuda, self.stream)
        self._lanes: weakref.WeakSet[TensorRtRuntime] = weakref.WeakSet()
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._sequences: weakref.WeakSet[CapturedSequence] = weakref.WeakSet()

    def lane(self, stream: object | None = None) -> Lane:
        """A second queue on the same GPU, whose work may overlap with this one's.

        It has a stream, contexts and activations of its own, and shares engines; tensors of either
        may be bound in the other, in an order that `wait_for` makes. Closing this runtime closes
        it.
        """
        self.check_open()
        made = Lane(self, stream)
        self._lanes.add(made)
        return made

    def load(self, path: Path, *, is_light: bool = False) -> TensorRtGraph:  # noqa: ARG002
        """A graph of the bundle, to be run by its plans.

        Raises `PlanMismatchError` where it has none for this library and GPU.
        """
        self.check_open()
        name, component = self._loader.component_at(path)
        return TensorRtGraph(self, name, component, self._loader.records(name, component))

    def context(self, record: PlanRecord, shapes: Shapes) -> Context:
        """A new context of a plan on this lane."""
        self.check_open()
        loader = self._loader
        engine = loader.engine(record)
        made = Context(
            self.cuda, self.stream, engine, self.block, shapes=shapes, cache=loader.cache
        )
        self._contexts.add(made)
        if loader.cache.problem:
            self.note(loader.cache.problem)
        return made

    def sequence(self, calls: Sequence[Call]) -> CapturedSequence | PlainSequence:
        """See `Runtime.sequence`: one CUDA graph from its second use on, where that is possible.

        `mode` and `problem` of the result, and `notes`, say where it is not. Raises `RenderError`
        for a call of another lane.
        """
        self.check_open()
        own = [call for call in calls if isinstance(call, BoundCall)]
        if any(call.context not in self._contexts for call in own):
            raise RenderError(
                "a sequence is made of calls that were bound on its own runtime, found one of "
                "another; bind all of them on one lane"
            )
        if len(own) < len(calls):
            return PlainSequence(calls)  # wrapped to be measured, call by call
        made = CapturedSequence(self.stream, own, self.note)
        self._sequences.add(made)
        return made

    def _free(self) -> None:
        self._keep_compiled()
        for lane in list(self._lanes):
            lane.close()
        for sequence in list(self._sequences):
            sequence.close()
        for context in list(self._contexts):
            context.close()
        self._free_engines()

    def _keep_compiled(self) -> None:
        cache = self._loader.cache
        cache.save()
        if cache.problem:
            self.note(cache.problem)

    def _free_engines(self) -> None:
        self.cuda.collect()
        self._loader.close()


class Lane(TensorRtRuntime):
    """A queue beside another's; see `TensorRtRuntime.lane`."""

    def __init__(self, main: TensorRtRuntime, stream: object | None) -> None:
        DeviceRuntime.__init__(self, main.cuda, stream)
        self.name, self.version, self.precisions = main.name, main.version, main.precisions
        self._turn = main.turn()
        self._main = main  # outlives the lane
        self._loader = main._loader
        self._begin()

    def _keep_compiled(self) -> None:
        """Leave it to the main runtime, as engines and device."""

    def _free_engines(self) -> None:
        self.cuda.collect()

    def _close_device(self) -> None:
        """Leave it to the main runtime."""


class PlainSequence:
    """Calls that are run one by one."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = tuple(calls)

    def enqueue(self) -> None:
        for call in self._calls:
            call.enqueue()


class TensorRtGraph:
    """A graph of a bundle by its plans; each bound set of shapes has a context, made once."""

    def __init__(
        self,
        runtime: TensorRtRuntime,
        name: str,
        component: Component,
        records: Sequence[PlanRecord],
    ) -> None:
        self._runtime, self._name, self._records = runtime, name, records
        self.inputs = _specs(component.inputs)
        self.outputs = _specs(component.outputs)
        self._contexts: dict[tuple[tuple[int, ...], ...], Context] = {}

    def bind(self, tensors: Mapping[str, Tensor]) -> BoundCall:
        """See `Graph.bind`; the newest plan whose profile holds all shapes is used.

        Raises:
            RenderError: where names, shapes, types or addresses do not fit.
            PlanMismatchError: where no plan holds the shapes, or the one that does cannot be used.
        """
        check_binding({**self.inputs, **self.outputs}, tensors)
        bound = {name: _on_device(name, tensor) for name, tensor in tensors.items()}
        context = self._context({name: bound[name].shape for name in self.inputs})
        for name in self.outputs:
            if context.shape(name) != bound[name].shape:
                raise RenderError(
                    f"the engine of {self._name} gives {name!r} in shape {context.shape(name)}, "
                    f"found a tensor of shape {bound[name].shape}; the bundle was built for other "
                    "sizes"
                )
        return BoundCall(context, bound)

    def _context(self, shapes: Shapes) -> Context:
        key = tuple(shapes.values())
        if key not in self._contexts:
            self._contexts[key] = self._runtime.context(self._record_for(shapes), shapes)
        return self._contexts[key]

    def _record_for(self, shapes: Shapes) -> PlanRecord:
        for record in self._records:
            if _holds(record, shapes):
                return record
        planned = "; or ".join(_profile_text(record) for record in self._records)
        asked = ", ".join(f"{name} {_size(shape)}" for name, shape in shapes.items())
        raise PlanMismatchError(
            f"no plan of {self._name} holds the shapes {asked}; planned is {planned}. Build one "
            "with `meancache-trt plan` and wider --batch, --height, --width, --frames or "
            "--text-tokens MIN/OPT/MAX"
        )


def open_tensorrt(
    bundle: Bundle, flavour: Flavour, gpu: Gpu, *, stream: object | None = None
) -> TensorRtRuntime:
    """A flavour on a GPU that was found. Raises `RuntimeUnavailableError` for what is missing."""
    from meancache_trt.engine.cuda.driver import open_device  # noqa: PLC0415  (only with a GPU)

    return TensorRtRuntime(bundle, load_library(flavour), open_device(gpu), stream=stream)


def _on_device(name: str, tensor: Tensor) -> DeviceTensor:
    if not isinstance(tensor, DeviceTensor):
        raise RenderError(
            f"TensorRT binds tensors of its own device, found {type(tensor).__name__} for {name!r}"
        )
    if tensor.pointer % ALIGNMENT_BYTES:
        raise RenderError(
            f"TensorRT takes addresses that are multiples of {ALIGNMENT_BYTES}, found "
            f"{tensor.pointer:#x} for {name!r}; copy the tensor to memory of its own"
        )
    return tensor


def _specs(records: Mapping[str, TensorRecord]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, record.dtype, record.shape) for name, record in records.items()}


def _holds(record: PlanRecord, shapes: Shapes) -> bool:
    profile = record.key.profile
    return all(
        profile[name].holds(shape) if name in profile else record.inputs[name].shape == shape
        for name, shape in shapes.items()
    )


def _profile_text(record: PlanRecord) -> str:
    ranges = record.key.profile.items()
    return ", ".join(f"{name} {_size(held.min)} to {_size(held.max)}" for name, held in ranges)


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
