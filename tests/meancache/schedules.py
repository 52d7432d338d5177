"""A schedule of each kind."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np

from meancache_trt.meancache.schedule import Evidence, ModelReference, Schedule, bake
from meancache_trt.meancache.sigmas import make_grid

NODES, SPANS = (0, 1, 3, 7, 14), (1, 2, 3, 4)
GRID = make_grid(20, shift=3.0)


def official() -> Schedule:
    return bake("official", GRID, NODES, SPANS)


def calibrated() -> Schedule:
    """An official table with evidence and a guidance scale, so that it is tied to both."""
    return bake(
        "official",
        make_grid(20, mu=0.7, shift_terminal=0.02, height=256, width=512, frames=9),
        NODES,
        SPANS,
        name="b5",
        family="flux",
        model=ModelReference(name="stand-in", digest="sha256:00"),
        guidance_scale=3.5,
        precision="bfloat16",
        calibration=Evidence(samples=8, seconds=1.25, edge_costs=(0.1,) * 5, gamma=3.0),
    )


def fitted() -> Schedule:
    """Weights that no rule gives, as least squares would leave them."""
    weights = tuple(
        tuple(np.random.default_rng(n).normal(size=min(n + 1, 3)).tolist())
        for n in range(len(NODES))
    )
    return Schedule(name="fit", grid=GRID, method="fitted", nodes=NODES, history=3, weights=weights)


SCHEDULES = {"official": official, "calibrated": calibrated, "fitted": fitted}


def as_fields(schedule: Schedule) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(msgspec.json.encode(schedule))
    return fields
