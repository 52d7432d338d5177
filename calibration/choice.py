"""What a strategy decides for one budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meancache_trt.meancache.folding import Rows


@dataclass(frozen=True)
class Choice:
    """Nodes (and spans, or rows that were fitted), with what is known about them (see `Evidence`).

    `evaluations` are network evaluations that the choice itself took.
    """

    nodes: tuple[int, ...]
    spans: tuple[int, ...] | None = None
    rows: Rows | None = None
    edge_costs: tuple[float, ...] | None = None
    path_cost: float | None = None
    cost: str | None = None
    gamma: float | None = None
    held_out_error: float | None = None
    evaluations: int = 0


Choose = Callable[[int], Choice]
"""Budget -> choice."""
