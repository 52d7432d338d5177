"""Which resolution and which schedule of a bundle a render uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from meancache_trt.bundle import Bundle
from meancache_trt.errors import BundleError, InputError, ScheduleError
from meancache_trt.manifest import Exported, Resolution
from meancache_trt.meancache.schedule import Schedule, load_schedule
from meancache_trt.meancache.sigmas import SigmaGrid, grid_from_config
from meancache_trt.shapes import PictureSize

GridOf = Callable[[int], SigmaGrid]
"""Steps -> the grid at the resolution that is rendered."""


def pipeline_grid(export: Exported, steps: int, resolution: Resolution) -> SigmaGrid:
    """The grid that the checkpoint's own pipeline would use with this many steps."""
    return grid_from_config(
        export.scheduler,
        steps,
        convention=export.grid,
        mu_rule=export.mu,
        image_tokens=resolution.symbols["image_tokens"],
        height=resolution.height,
        width=resolution.width,
        frames=resolution.frames,
        second_stage=export.second_stage,
    )


def find_resolution(
    bundle: Bundle, height: int | None, width: int | None, frames: int | None
) -> Resolution:
    """The first of a bundle's resolutions that has the values given.

    Raises `BundleError` that lists what there is, and says how to add another, and `InputError` for
    frames of a picture.
    """
    wanted = (height, width, frames)
    for resolution in bundle.export.resolutions:
        found = (resolution.height, resolution.width, resolution.frames)
        if all(value in (None, own) for value, own in zip(wanted, found, strict=True)):
            return resolution
    default = bundle.export.resolution
    if default.frames is None and frames is not None:
        raise InputError(f"this bundle makes pictures, found {frames} frames; leave frames out")
    asked = PictureSize(height or default.height, width or default.width, frames or default.frames)
    known = ", ".join(map(str, bundle.export.sizes))
    raise BundleError(
        f"this bundle renders {known}, found {asked}; add it with `meancache-trt export MODEL -o "
        f"{bundle.directory} --resolution {asked}`"
    )


def calibrated_size(schedule: Schedule) -> PictureSize | None:
    """The size that a schedule was calibrated at; None where it belongs to none."""
    return None if schedule.calibration is None else grid_size(schedule.grid)


def grid_size(grid: SigmaGrid) -> PictureSize | None:
    """The size that a grid was made for; None where it names none."""
    if grid.height is None or grid.width is None:
        return None
    return PictureSize(grid.height, grid.width, grid.frames)


def find_schedule(
    bundle: Bundle, wanted: str | int | Path | None, size: PictureSize, grid_of: GridOf
) -> Schedule:
    """The schedule that a user means by a name in the bundle, a budget, a file, or None.

    A budget is that of the only schedule that is calibrated for this resolution, or of the only
    one where none is calibrated; None is the largest such schedule.

    Raises:
        BundleError: where there is none of that name or budget, or several of that budget.
        ScheduleError: where those that could be meant were calibrated for other resolutions.
    """
    schedules = [bundle.schedule(name) for name in bundle.schedule_names()]
    if wanted is None:
        return _largest(bundle, schedules, size, grid_of)
    if isinstance(wanted, int) or (isinstance(wanted, str) and wanted.isdecimal()):
        return _of_budget(bundle, int(wanted), schedules, size, grid_of)
    if Path(wanted).suffix == ".json":
        return load_schedule(wanted)
    return bundle.schedule(str(wanted))


def check_model(export: Exported, schedule: Schedule) -> None:
    """Raise `ScheduleError` for a schedule of another family or checkpoint, or of more stages."""
    if schedule.family not in (None, export.family):
        raise ScheduleError(
            f"schedule {schedule.name!r} is for the family {schedule.family!r}, this bundle is "
            f"{export.family!r}; bake one for it"
        )
    if schedule.model is not None and schedule.model.digest not in (None, export.model.digest):
        raise ScheduleError(
            f"schedule {schedule.name!r} was calibrated on {schedule.model.name!r} (digest "
            f"{str(schedule.model.digest)[:12]}), this bundle is {export.model.name!r} (digest "
            f"{export.model.digest[:12]}); calibrate on this checkpoint"
        )
    if schedule.grid.second_stage is not None and export.second_stage is None:
        raise ScheduleError(
            f"schedule {schedule.name!r} has a second transformer "
            f"{schedule.grid.second_stage}, this bundle has one transformer; bake one for it"
        )


def check_grid(bundle: Bundle, schedule: Schedule, size: PictureSize, grid: SigmaGrid) -> None:
    """Raise `ScheduleError` for a schedule that belongs to another grid than that of `size`."""
    try:
        schedule.check_grid(grid)
    except ScheduleError as error:
        raise ScheduleError(
            f"{error}. To make one for {size}: `meancache-trt calibrate MODEL -o DIRECTORY "
            f"--resolution {size}`, then `meancache-trt bake --calibration DIRECTORY --budget "
            f"{schedule.budget} --bundle {bundle.directory}`"
        ) from error


def _largest(
    bundle: Bundle, schedules: Sequence[Schedule], size: PictureSize, grid_of: GridOf
) -> Schedule:
    if not schedules:
        raise BundleError(f"{bundle.directory} has no schedule yet; `meancache-trt bake` makes one")
    return _fitting(bundle, schedules, size, grid_of)[0]


def _of_budget(
    bundle: Bundle,
    budget: int,
    schedules: Sequence[Schedule],
    size: PictureSize,
    grid_of: GridOf,
) -> Schedule:
    of_budget = [found for found in schedules if found.budget == budget]
    if not of_budget:
        raise BundleError(
            f"{bundle.directory} has no schedule of {budget} evaluations; it has "
            f"{[found.budget for found in schedules]}. Add one with `meancache-trt bake`"
        )
    fitting = _fitting(bundle, of_budget, size, grid_of)
    if len(fitting) > 1:
        raise BundleError(
            f"{bundle.directory} has several schedules of {budget} evaluations: "
            f"{', '.join(found.name for found in fitting)}; ask for one by name"
        )
    return fitting[0]


def _fitting(
    bundle: Bundle, schedules: Sequence[Schedule], size: PictureSize, grid_of: GridOf
) -> Sequence[Schedule]:
    """The calibrated ones of this grid, if any of this very size those alone, in order.

    All of them where none is calibrated. Resolutions whose grids are equal share schedules.
    """
    calibrated = [found for found in schedules if found.calibration is not None]
    if not calibrated:
        return schedules
    fitting = [
        found for found in calibrated if found.grid.difference(grid_of(found.grid.steps)) is None
    ]
    if not fitting:
        check_grid(bundle, calibrated[0], size, grid_of(calibrated[0].grid.steps))
    return [found for found in fitting if calibrated_size(found) == size] or fitting
