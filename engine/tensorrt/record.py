"""What a plan was built from and for: its key, and the sidecar that describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from meancache_trt.engine.tensorrt.library import Flavour
from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.hashing import digest_of

Version = Literal["meancache-trt/plan/1"]
Shape = tuple[int, ...]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
TilingOptimization = Literal["none", "fast", "moderate", "full"]


class ShapeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The smallest, the usual and the largest shape of an input; no axis descends."""

    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Shape) -> bool:
        """Whether a plan that was built for this range takes `shape`."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changes the plan that TensorRT builds; None leaves it to the library.

    The names are those of trtexec. `workspace_bytes` is the limit of the workspace pool.
    """

    builder_optimization_level: int | None = None
    workspace_bytes: int | None = None
    weight_streaming: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    tiling_optimization_level: TilingOptimization = "none"
    max_aux_streams: int | None = None


class PlanKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a plan depends on; a plan is used again only where all of it is equal.

    `component` is the graph's name in the bundle, such as "transformer/bfloat16"; `graph` the
    SHA-256 over the graph's file and its weight files; `profile` the shapes of its inputs;
    `compute_capability` such as "8.9".
    """

    component: str
    graph: str
    precision: str
    profile: Mapping[str, ShapeRange]
    flavour: Flavour
    version: str
    compute_capability: str
    options: BuildOptions = BuildOptions()

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return digest_of(encode_json(msgspec.structs.replace(self, profile=_sorted(self.profile))))


class PlanTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output as the network definition has it; -1 is a dynamic dimension."""

    dtype: str
    shape: Shape


class PlanFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A serialised engine; `path` is relative to the bundle."""

    path: str
    size_bytes: int
    sha256: str


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The JSON file beside a plan.

    `built_at` is UTC in ISO 8601, `fused_attention` the number of distinct fused attention
    kernels, `peak_memory_bytes` the largest resident size of the process that built it.
    """

    schema: Version = "meancache-trt/plan/1"
    key: PlanKey
    inputs: dict[str, PlanTensor]
    outputs: dict[str, PlanTensor]
    file: PlanFile
    fused_attention: int
    build_s: float
    peak_memory_bytes: int
    built_at: str


def _sorted(profile: Mapping[str, ShapeRange]) -> dict[str, ShapeRange]:
    return dict(sorted(profile.items()))
