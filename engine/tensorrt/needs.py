"""Which plans a render of a bundle needs, and whether they are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.library import Library
from meancache_trt.engine.tensorrt.store import PlanStore
from meancache_trt.engine.tensorrt.target import precisions_for
from meancache_trt.errors import PlanMismatchError
from meancache_trt.manifest import component_name


def planned_precisions(
    bundle: Bundle, library: Library, compute_capability: str
) -> tuple[str, ...]:
    """The precisions of a transformer that can be loaded, preferred first, then the others."""
    wanted = precisions_for(compute_capability)
    names = {precision: component_name("transformer", precision) for precision in wanted}
    here = [
        precision
        for precision, name in names.items()
        if name in bundle.export.components
        and _problem(bundle, [name], library, compute_capability) is None
    ]
    return (*here, *(precision for precision in wanted if precision not in here))


def check_plans(bundle: Bundle, library: Library, compute_capability: str) -> None:
    """Raise `PlanMismatchError` where a graph that a render needs has no plan for this GPU.

    Of networks one precision is needed, of update graphs one.
    """
    for names in _needed(bundle, precisions_for(compute_capability)):
        problem = _problem(bundle, names, library, compute_capability)
        if problem is not None:
            raise problem


def _needed(bundle: Bundle, precisions: Sequence[str]) -> Iterable[list[str]]:
    """For each graph of a render the components any of which will do."""
    components = bundle.export.components
    updates = [name for name in components if name.startswith("update/")]
    texts = bundle.export.text_graphs()
    parts = ("transformer", "vae_decoder", "prepare", *texts)
    networks = [[component_name(part, precision) for precision in precisions] for part in parts]
    return [[name for name in names if name in components] for names in [*networks, updates]]


def _problem(
    bundle: Bundle, names: Sequence[str], library: Library, compute_capability: str
) -> PlanMismatchError | None:
    """Why none of some components can be loaded; None where one can."""
    store, problem = PlanStore(bundle), None
    for name in names:
        try:
            store.loadable(
                name,
                bundle.export.components[name],
                flavour=library.flavour,
                version=library.version,
                capability=compute_capability,
            )
        except PlanMismatchError as error:
            problem = error
        else:
            return None
    return problem
