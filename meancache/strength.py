"""Schedules that begin midway, for image-to-image and inpainting.

There a picture is mixed with noise at some step of the grid, and integration goes on from it. What
is left of a schedule is a schedule of what is left of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.folding import Rows
from meancache_trt.meancache.methods import get_method
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import SigmaGrid


def first_step(steps: int, strength: float) -> int:
    """The step of a grid of `steps` at which diffusers begins for `strength`; 1 is step 0.

    Raises `ScheduleError` for a strength outside (0, 1], and where no step would be left.
    """
    if not 0 < strength <= 1:
        raise ScheduleError(
            f"strength is above 0 and at most 1, found {strength}; 1 replaces the picture, and at "
            "0 there is nothing to render"
        )
    # `get_timesteps` of FluxImg2ImgPipeline and of the others, whose rounding decides.
    step = int(max(steps - min(steps * strength, steps), 0))
    if step >= steps:
        raise ScheduleError(
            f"strength {strength} leaves none of {steps} steps; {1 / steps:.3g} leaves one"
        )
    return step


def begin_at(schedule: Schedule, step: int) -> Schedule:
    """What is left of `schedule` from a step of its grid on, as a schedule of the rest of the grid.

    `step` becomes step 0 and is evaluated, also where it was no node. Analytic methods are folded
    again, with spans cut to the steps that there are. A fitted table keeps the rows that read
    nothing from before `step`; the others, and that of an added node, become Euler's, so that
    they move by the exact difference of sigmas. The evidence is left out, because it was measured
    over the whole grid.
    """
    if step == 0:
        return schedule
    kept = [n for n, node in enumerate(schedule.nodes) if node >= step]
    added = 0 if kept and schedule.nodes[kept[0]] == step else 1
    nodes = (0,) * added + tuple(schedule.nodes[n] - step for n in kept)
    grid = _rest(schedule.grid, step)
    if schedule.is_analytic:
        return bake(
            schedule.method,
            grid,
            nodes,
            _spans(schedule, nodes, kept),
            name=schedule.name,
            family=schedule.family,
            model=schedule.model,
            guidance_scale=schedule.guidance_scale,
            guidance_range=schedule.guidance_range,
            precision=schedule.precision,
        )
    rows = _fitted_rows(schedule, get_method("euler").fold(grid.array(), nodes), kept)
    return msgspec.structs.replace(
        schedule,
        grid=grid,
        nodes=nodes,
        weights=rows,
        history=max(map(len, rows)),
        calibration=None,
    )


def _rest(grid: SigmaGrid, step: int) -> SigmaGrid:
    return msgspec.structs.replace(
        grid,
        steps=grid.steps - step,
        sigmas=grid.sigmas[step:],
        timesteps=grid.timesteps[step:],
        convention="custom",
        image_tokens=None,  # of which mu would be another for these steps
    )


def _spans(schedule: Schedule, nodes: Sequence[int], kept: Sequence[int]) -> tuple[int, ...] | None:
    """The spans of the kept edges; an added node, which has no history, reuses its velocity."""
    if schedule.spans is None:
        return None
    spans = [schedule.spans[n] for n in kept[:-1]]
    if len(spans) < len(nodes) - 1:
        spans.insert(0, 1)
    return tuple(min(span, node + 1) for node, span in zip(nodes[:-1], spans, strict=True))


def _fitted_rows(schedule: Schedule, euler: Rows, kept: Sequence[int]) -> Rows:
    added = len(euler) - len(kept)
    rows = list(euler)
    for count, n in enumerate(kept, start=1):
        row = schedule.weights[n]
        if not any(row[count:]):
            rows[added + count - 1] = row[:count]
    return tuple(rows)
