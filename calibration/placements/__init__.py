"""Ways to place a method's nodes for a budget. One file each; a method names its own.

Spans and costs come from recorded trajectories, as far as a placement needs any.
"""

from __future__ import annotations

from meancache_trt.calibration.placements import change, even, minimax, own_grid, shortest
from meancache_trt.calibration.placements.base import Placement
from meancache_trt.errors import CalibrationError

PLACEMENTS: dict[str, Placement] = {
    placement.name: placement
    for placement in (
        shortest.PLACEMENT,
        minimax.PLACEMENT,
        change.PLACEMENT,
        even.PLACEMENT,
        own_grid.PLACEMENT,
    )
}


def get_placement(name: str) -> Placement:
    """Return the placement called `name`. Raises `CalibrationError` that lists all of them."""
    try:
        return PLACEMENTS[name]
    except KeyError:
        raise CalibrationError(
            f"unknown placement {name!r}; expected one of {', '.join(PLACEMENTS)}"
        ) from None


__all__ = ["PLACEMENTS", "Placement", "get_placement"]
