"""What a strategy decides for one budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meancache_trt.calibration.fidelity import Outcome
from meancache_trt.meancache.folding import Rows


@dataclass(frozen=True)
class Choice:
    """Nodes (and spans, or rows that were fitted), with what is known about them (see `Evidence`).

    `outcome` is set where the choice ran the network; `evaluations` are those that it took to
    compare `candidates` tables.
    """

    nodes: tuple[int, ...]
    spans: tuple[int, ...] | None = None
    rows: Rows | None = None
    edge_costs: tuple[float, ...] | None = None
    path_cost: float | None = None
    cost: str | None = None
    gamma: float | None = None
    outcome: Outcome | None = None
    candidates: int = 0
    evaluations: int = 0


Choose = Callable[[int], Choice]
"""Budget -> choice."""
