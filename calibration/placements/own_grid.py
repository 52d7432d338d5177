"""Every step of a shorter grid of the same kind, as one runs a solver without skipping.

So a diffusers user gets B evaluations: by asking the pipeline for B steps. The grid is made as the
recorded one was, with the same shift; the grid knows where pipelines take that from the steps too.
"""

from __future__ import annotations

from meancache_trt.calibration.choice import Choice, Choose
from meancache_trt.calibration.placements.base import Placement, PlacementOptions
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.methods import get_method
from meancache_trt.meancache.sigmas import SigmaGrid, make_grid


def own_grid(grid: SigmaGrid, steps: int) -> SigmaGrid:
    """The grid of `steps` steps of the same kind as `grid`.

    Raises `CalibrationError` where `grid` is not what its own record makes of its steps: for
    custom sigmas, say.
    """
    if grid.convention == "custom" or _made_as(grid, grid.steps).difference(grid) is not None:
        raise CalibrationError(
            f"expected a grid that can be made with {steps} steps as well, found one of "
            f"{grid.convention!r} sigmas that its record does not make again; choose another "
            "placement, such as `even`"
        )
    return _made_as(grid, steps)


def _made_as(grid: SigmaGrid, steps: int) -> SigmaGrid:
    return make_grid(
        steps,
        convention=grid.convention,
        shift=1.0 if grid.shift is None else grid.shift,
        mu=grid.mu,
        time_shift_type=grid.time_shift_type or "exponential",
        shift_terminal=grid.shift_terminal,
        num_train_timesteps=grid.num_train_timesteps,
        height=grid.height,
        width=grid.width,
        frames=grid.frames,
        image_tokens=grid.image_tokens,
        second_stage=grid.second_stage,
    )


def _place(_trajectories: Trajectories, options: PlacementOptions) -> Choose:
    uses_spans = get_method(options.method).uses_spans

    def choose(budget: int) -> Choice:
        # Nothing is skipped, so that a span has nothing to say.
        return Choice(tuple(range(budget)), (1,) * (budget - 1) if uses_spans else None)

    return choose


PLACEMENT = Placement("own-grid", "all steps of a grid of that many steps", _place, own_grid)
