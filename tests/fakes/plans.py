"""Plans of the fake TensorRT, written into a real bundle with real sidecars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta

import msgspec

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.library import Flavour
from meancache_trt.engine.tensorrt.record import (
    BuildOptions,
    PlanFile,
    PlanKey,
    PlanRecord,
    PlanTensor,
    ShapeRange,
)
from meancache_trt.engine.tensorrt.store import PlanStore, graph_digest
from meancache_trt.manifest import Component, TensorRecord
from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.hashing import digest_of
from tests.fakes.tensorrt import VERSION, PlanText

SMALLEST, LARGEST = 1, 1 << 16
_START = datetime(2026, 1, 1, tzinfo=UTC)

Change = Callable[[PlanText], PlanText]


def unchanged(plan: PlanText) -> PlanText:
    return plan


def wide(component: Component) -> dict[str, ShapeRange]:
    """A profile that holds every size."""
    return {name: _wide(record) for name, record in component.inputs.items()}


def add_plan(
    bundle: Bundle,
    name: str,
    *,
    profile: Mapping[str, ShapeRange] | None = None,
    flavour: Flavour = "tensorrt_rtx",
    version: str = VERSION,
    compute_capability: str = "8.9",
    options: BuildOptions | None = None,
    change: Change = unchanged,
) -> PlanRecord:
    """Plan one component; later plans are newer. `change` is done to what the plan's file says."""
    component = bundle.export.components[name]
    ranges = dict(profile or wide(component))
    key = PlanKey(
        component=name,
        graph=graph_digest(bundle, component),
        precision=component.precision,
        profile=ranges,
        flavour=flavour,
        version=version,
        compute_capability=compute_capability,
        options=options or BuildOptions(),
    )
    path = str(bundle.component_path(component))
    plan = change(PlanText(path, version, compute_capability, ranges))
    content = msgspec.json.encode(plan)
    file = PlanFile(f"{addition_name(key)}.plan", len(content), digest_of(content))
    (bundle.directory / "plans").mkdir(exist_ok=True)
    (bundle.directory / file.path).write_bytes(content)
    record = PlanRecord(
        key=key,
        inputs={name: _tensor(record) for name, record in component.inputs.items()},
        outputs={name: _tensor(record) for name, record in component.outputs.items()},
        file=file,
        fused_attention=0,
        build_s=0.0,
        peak_memory_bytes=0,
        built_at=(_START + timedelta(seconds=len(PlanStore(bundle).records()))).isoformat(),
    )
    bundle.add_file(addition_name(key), encode_json(record))
    return record


def addition_name(key: PlanKey) -> str:
    """What a plan's sidecar is called in the manifest."""
    component = key.component.replace("/", "-")
    capability = key.compute_capability.replace(".", "")
    return f"plans/{component}.sm{capability}.{key.digest[:12]}"


def plan_everything(
    bundle: Bundle, *, flavour: Flavour = "tensorrt_rtx", only: Iterable[str] = ()
) -> None:
    """Plan every float32 component, which is what runs on this machine."""
    for name, component in bundle.export.components.items():
        if component.precision == "float32" and (not only or name in only):
            add_plan(bundle, name, flavour=flavour)


def _wide(record: TensorRecord) -> ShapeRange:
    low = tuple(SMALLEST if isinstance(size, str) else size for size in record.shape)
    high = tuple(LARGEST if isinstance(size, str) else size for size in record.shape)
    assert math.prod(low) > 0
    return ShapeRange(low, low, high)


def _tensor(record: TensorRecord) -> PlanTensor:
    return PlanTensor(
        record.dtype, tuple(-1 if isinstance(size, str) else size for size in record.shape)
    )
