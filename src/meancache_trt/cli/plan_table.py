"""The plans of a bundle, as tables and facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from meancache_trt.bundle import Bundle
from meancache_trt.cli.output import print_table
from meancache_trt.engine.tensorrt.record import PlanRecord
from meancache_trt.engine.tensorrt.store import PlanStore, graph_digest
from meancache_trt.errors import PlanMismatchError
from meancache_trt.shapes import Range


@dataclass(frozen=True)
class ListedPlan:
    """A plan, the sizes that it is for by symbol, and what is wrong with its file, if anything.

    `is_current` is off where the bundle has another graph of that name, or none.
    """

    record: PlanRecord
    sizes: dict[str, Range]
    is_current: bool
    problem: str | None

    @property
    def state(self) -> str:
        """What is worth a word in a table."""
        if self.problem is not None:
            return "unusable"
        return "" if self.is_current else "of another graph"


def list_plans(bundle: Bundle, *, is_full_check: bool) -> list[ListedPlan]:
    """Every plan in the order of components; all bytes are hashed with `is_full_check`."""
    store = PlanStore(bundle)
    order = list(bundle.export.components)
    places = {name: index for index, name in enumerate(order)}
    records = sorted(
        store.records(),
        key=lambda record: (
            places.get(record.key.component, len(order)),
            _sortable(record.key.compute_capability),
        ),
    )
    return [_listed(store, record, is_full_check=is_full_check) for record in records]


def _sortable(capability: str) -> list[int]:
    return [int(part) for part in capability.split(".")]


def _listed(store: PlanStore, record: PlanRecord, *, is_full_check: bool) -> ListedPlan:
    component = store.bundle.export.components.get(record.key.component)
    is_current = component is not None and (
        graph_digest(store.bundle, component) == record.key.graph
    )
    problem = None
    try:
        store.checked_path(record, is_full_check=is_full_check)
    except PlanMismatchError as error:
        problem = str(error)
    return ListedPlan(record, _sizes(store.bundle, record), is_current, problem)


def _sizes(bundle: Bundle, record: PlanRecord) -> dict[str, Range]:
    """What the profile says of each symbol in the shapes of the component's inputs."""
    component = bundle.export.components.get(record.key.component)
    sizes: dict[str, Range] = {}
    for name, tensor in component.inputs.items() if component else ():
        shapes = record.key.profile.get(name)
        ends = (shapes.min, shapes.opt, shapes.max) if shapes else ()
        for symbol, *values in zip(tensor.shape, *ends, strict=False) if ends else ():
            if isinstance(symbol, str):
                sizes.setdefault(symbol, Range(*values))
    return sizes


def print_plans(plans: Sequence[ListedPlan]) -> None:
    """Print one line a plan."""
    print_table(
        [
            *("plan", "precision", "GPU", "library", "sizes", "MB", "built in s"),
            *("fused attention", ""),
        ],
        [
            [
                plan.record.key.component,
                plan.record.key.precision,
                plan.record.key.compute_capability,
                f"{plan.record.key.flavour} {plan.record.key.version}",
                ", ".join(f"{name} {_short(size)}" for name, size in plan.sizes.items()),
                f"{plan.record.file.size_bytes / 1e6:.1f}",
                f"{plan.record.build_s:.1f}",
                plan.record.fused_attention,
                plan.state,
            ]
            for plan in plans
        ],
    )


def _short(size: Range) -> str:
    return str(size.opt) if size.min == size.max else str(size)


def plan_facts(plan: ListedPlan) -> dict[str, object]:
    """What `--json` says of a plan."""
    return {
        **msgspec.to_builtins(plan.record),
        "sizes": plan.sizes,
        "is_current": plan.is_current,
        "problem": plan.problem,
    }
