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
    here = [
        precision
        for precision in wanted
        for names in _graphs(bundle, bundle.export.transformers, [precision])
        if _problem(bundle, [names], library, compute_capability) is None
    ]
    return (*here, *(precision for precision in wanted if precision not in here))


def check_plans(bundle: Bundle, library: Library, compute_capability: str) -> None:
    """Raise `PlanMismatchError` where a graph that a render needs has no plan for this GPU.

    Of networks one precision is needed, the same of both transformers, of update graphs one.
    """
    for choices in _needed(bundle, precisions_for(compute_capability)):
        problem = _problem(bundle, choices, library, compute_capability)
        if problem is not None:
            raise problem


def _needed(bundle: Bundle, precisions: Sequence[str]) -> Iterable[list[list[str]]]:
    """What a render needs: for each need the choices, any of which will do, of components."""
    parts = ("vae_decoder", "prepare", *bundle.export.text_graphs())
    for together in [bundle.export.transformers, *((part,) for part in parts)]:
        yield _graphs(bundle, together, precisions)
    yield [[name] for name in bundle.export.components if name.startswith("update/")]


def _graphs(bundle: Bundle, parts: Sequence[str], precisions: Sequence[str]) -> list[list[str]]:
    """The graphs of some parts, in each of `precisions` that they have."""
    choices = [[component_name(part, precision) for part in parts] for precision in precisions]
    return [names for names in choices if names[0] in bundle.export.components]


def _problem(
    bundle: Bundle, choices: Sequence[Sequence[str]], library: Library, compute_capability: str
) -> PlanMismatchError | None:
    """Why not all components of any choice can be loaded; None where they can."""
    problem = None
    for names in choices:
        try:
            for name in names:
                PlanStore(bundle).loadable(
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
