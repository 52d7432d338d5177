"""Plans deserialised into engines, and everything that is checked on the way.

Engines are shared by the lanes of a runtime. A native object goes with its wrapper: contexts before
their engine, engines before the runtime, and never while work is under way.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from meancache_trt.bundle import Bundle
from meancache_trt.engine.cuda.device import Device
from meancache_trt.engine.tensorrt.library import ErrorLog, Library
from meancache_trt.engine.tensorrt.record import PlanRecord, PlanTensor
from meancache_trt.engine.tensorrt.runtime_cache import RuntimeCache
from meancache_trt.engine.tensorrt.store import PlanStore
from meancache_trt.errors import PlanMismatchError, RenderError
from meancache_trt.manifest import Component

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_STREAMED_SHARE = 0.9
"""Of the free memory, what weights and activations of a streamed engine may take: the rest is for
the tensors of a loop and for other engines."""


class Owned:
    """Native objects of TensorRT, freed in order when this goes, or by `close`.

    Freeing from a finalizer is put off until no work is under way.
    """

    def __init__(self, device: Device, *natives: Any) -> None:
        self._natives = list(natives)
        self._free = weakref.finalize(self, device.discard, _freeing(self._natives))
        self._free.atexit = False  # the process's end frees them

    @property
    def native(self) -> Any:
        """The first of them. Raises `RenderError` once they are freed."""
        if not self._natives:
            raise RenderError("the runtime was closed; open it again")
        return self._natives[0]

    def close(self) -> None:
        """Free them now; nothing may be using them."""
        self._free.detach()
        _freeing(self._natives)()


class Engine(Owned):
    """A deserialised plan.

    Attributes:
        module: the library's.
        record: the plan's sidecar.
        log: what TensorRT says when it refuses.
        is_streaming: whether its weights are streamed, which cannot be captured in a CUDA graph.
    """

    def __init__(
        self,
        device: Device,
        native: Any,
        runtime: Owned,
        *,
        module: Any,
        record: PlanRecord,
        log: ErrorLog,
    ) -> None:
        super().__init__(device, native)
        self._runtime = runtime  # outlives the engine
        self.module, self.record, self.log = module, record, log
        self.is_streaming = False

    def stream_weights(self, free_bytes: int) -> None:
        """Give its weights what is left of the free memory. Raises `RenderError` where refused."""
        native = self.native
        weights = native.streamable_weights_size
        # Not the library's own automatic budget, which its Python binding cuts to 32 bits.
        others = native.device_memory_size_v2 + native.weight_streaming_scratch_memory_size
        budget = min(max(int(_STREAMED_SHARE * free_bytes) - others, 0), weights)
        native.weight_streaming_budget_v2 = budget
        if native.weight_streaming_budget_v2 != budget:
            raise RenderError(
                f"TensorRT does not keep {budget} bytes of the weights of "
                f"{self.record.key.component} on the GPU: {self.log.reason()}; close other "
                "programs, or plan without --weight-streaming"
            )
        self.is_streaming = budget < weights


class EngineLoader:
    """The engines of a bundle's plans on one GPU, each deserialised at its first use.

    Args:
        bundle: opened.
        library: the flavour to use.
        device: the GPU.
        cache: of kernels compiled at run time, where the flavour has one.
    """

    def __init__(
        self, bundle: Bundle, library: Library, device: Device, cache: RuntimeCache
    ) -> None:
        self.bundle, self.library, self.device, self.cache = bundle, library, device, cache
        self.log = ErrorLog(library)
        self._store = PlanStore(bundle)
        self._engines: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
        self._runtime: Owned | None = None

    def component_at(self, path: Path) -> tuple[str, Component]:
        """The bundle's component whose graph is at `path`. Raises `PlanMismatchError` for none."""
        for name, component in self.bundle.export.components.items():
            if self.bundle.component_path(component) == path:
                return name, component
        raise PlanMismatchError(
            f"expected a graph of {self.bundle.directory}, whose plans this runtime runs, found "
            f"{path}; open a runtime with the bundle that it belongs to"
        )

    def records(self, name: str, component: Component) -> list[PlanRecord]:
        """Plans of a component for this library and GPU; see `PlanStore.loadable`."""
        return self._store.loadable(
            name,
            component,
            flavour=self.library.flavour,
            version=self.library.version,
            capability=self.device.compute_capability,
        )

    def engine(self, record: PlanRecord) -> Engine:
        """The engine of a plan, shared by all who hold it.

        Raises `PlanMismatchError` where the plan was altered, TensorRT does not take it, or it has
        other inputs and outputs than its record says.
        """
        found = self._engines.get(record.file.path)
        if found is None:
            found = self._deserialised(record, self._store.checked_path(record))
            self._engines[record.file.path] = found
        return found

    def close(self) -> None:
        """Free engines and runtime; nothing may be using them."""
        for engine in list(self._engines.values()):
            engine.close()
        self.cache.close()
        if self._runtime is not None:
            self._runtime.close()

    def _deserialised(self, record: PlanRecord, path: Path) -> Engine:
        self.device.activate()
        runtime = self._opened()
        plan = np.memmap(path, mode="r")  # read once, by TensorRT
        self._check_validity(runtime.native, plan, record)
        native = runtime.native.deserialize_cuda_engine(plan)
        if native is None:
            raise self._refusal(record, self.log.reason())
        module = self.library.module
        engine = Engine(self.device, native, runtime, module=module, record=record, log=self.log)
        self._check_tensors(native, record)
        if record.key.options.weight_streaming:
            engine.stream_weights(self.device.free_bytes())
        return engine

    def _opened(self) -> Owned:
        if self._runtime is None:
            native = self.library.module.Runtime(self.log.logger)
            # A plan of a bundle from elsewhere must not bring code that runs on the host.
            native.engine_host_code_allowed = False
            self._runtime = Owned(self.device, native)
        return self._runtime

    def _check_validity(self, runtime: Any, plan: Any, record: PlanRecord) -> None:
        """Ask before the weights are loaded, where the flavour can tell."""
        if not hasattr(runtime, "get_engine_validity"):
            return
        module = self.library.module
        validity, bits = runtime.get_engine_validity(plan)
        if validity == module.EngineValidity.INVALID:
            members = module.EngineInvalidityDiagnostics.__members__.items()
            problems = [name for name, member in members if int(member.value) & int(bits)]
            raise self._refusal(record, ", ".join([*problems, self.log.reason()]))

    def _check_tensors(self, native: Any, record: PlanRecord) -> None:
        modes = self.library.module.TensorIOMode
        found: dict[Any, dict[str, PlanTensor]] = {modes.INPUT: {}, modes.OUTPUT: {}}
        for index in range(native.num_io_tensors):
            name = native.get_tensor_name(index)
            found[native.get_tensor_mode(name)][name] = PlanTensor(
                _dtype_name(native.get_tensor_dtype(name)), tuple(native.get_tensor_shape(name))
            )
            if native.get_tensor_location(name) != self.library.module.TensorLocation.DEVICE:
                raise self._refusal(record, f"it reads or writes {name!r} in host memory")
        _compare(record.inputs, found[modes.INPUT], record)
        _compare(record.outputs, found[modes.OUTPUT], record)

    def _refusal(self, record: PlanRecord, words: str) -> PlanMismatchError:
        key = record.key
        return PlanMismatchError(
            f"{key.flavour} {key.version} does not take {record.file.path} on this GPU of compute "
            f"capability {self.device.compute_capability}: {words}; build it again with "
            f"`meancache-trt plan {self.bundle.directory}`"
        )


def _compare(
    expected: Mapping[str, PlanTensor], found: Mapping[str, PlanTensor], record: PlanRecord
) -> None:
    # A builder may find out more of an output's shape than the network definition says.
    fits = expected.keys() == found.keys() and all(
        tensor.dtype == found[name].dtype and _agree(tensor.shape, found[name].shape)
        for name, tensor in expected.items()
    )
    if not fits:
        raise PlanMismatchError(
            f"{record.file.path} is not what its record says: expected {_text(expected)}, found "
            f"{_text(found)}; build it again with `meancache-trt plan`"
        )


def _agree(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    return len(expected) == len(found) and all(
        -1 in pair or pair[0] == pair[1] for pair in zip(expected, found, strict=True)
    )


def _text(tensors: Mapping[str, PlanTensor]) -> str:
    return ", ".join(f"{name} {tensor.dtype}{tensor.shape}" for name, tensor in tensors.items())


def _dtype_name(dtype: Any) -> str:
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())


def _freeing(natives: list[Any]) -> Any:
    def free() -> None:
        while natives:
            natives.pop(0)

    return free
