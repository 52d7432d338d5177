"""What a placement is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.choice import Choose
from meancache_trt.calibration.costs import Norm, Scaling
from meancache_trt.calibration.refit import mean_gram, refit_spans
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.meancache.methods import get_method
from meancache_trt.meancache.sigmas import SigmaGrid


class PlacementOptions(Protocol):
    """What a placement reads of `BakeOptions`."""

    @property
    def method(self) -> str:
        """The method whose nodes are placed."""

    @property
    def scaling(self) -> Scaling:
        """See `CostRule`; so are the next two."""

    @property
    def norm(self) -> Norm: ...

    @property
    def max_span(self) -> int: ...

    @property
    def gamma(self) -> float:
        """The exponent of `shortest_path`."""

    @property
    def is_refitted(self) -> bool:
        """Whether spans are chosen again by the errors of the rows."""


Place = Callable[[Trajectories, PlacementOptions], Choose]
GridOf = Callable[[SigmaGrid, int], SigmaGrid]


def _recorded(grid: SigmaGrid, _budget: int) -> SigmaGrid:
    return grid


@dataclass(frozen=True)
class Placement:
    """A way to place a method's nodes.

    `place` measures what it needs once, whatever the number of budgets, and gives the choice for
    each. Nodes are steps of `grid_of(recorded grid, budget)`, which is the recorded grid by
    default.
    """

    name: str
    summary: str
    place: Place
    grid_of: GridOf = _recorded


Spans = tuple[int, ...] | None


def choose_spans(
    trajectories: Trajectories,
    options: PlacementOptions,
    gram: NDArray[np.float64] | None = None,
) -> Callable[[tuple[int, ...]], Spans]:
    """How the spans of given nodes are chosen: by the errors of the rows; None without use.

    `gram` is `mean_gram(trajectories)`, so that a caller who has it does not read them twice.
    """
    if not get_method(options.method).uses_spans:
        return lambda _nodes: None
    known = mean_gram(trajectories) if gram is None else gram
    sigmas, longest = trajectories.grid.array(), min(options.max_span, trajectories.grid.steps)
    return lambda nodes: refit_spans(options.method, known, sigmas, nodes, longest)
