"""Every error that the library raises on purpose.

    MeanCacheError
    ├── ScheduleError          a schedule that is malformed, or does not fit what it is used for
    ├── BundleError            a bundle that is missing, damaged, or lacks what was asked for
    ├── ExportError            a checkpoint that cannot be exported, or fails the export's checks
    ├── CalibrationError       trajectories that are missing, inconsistent or not finite
    ├── RuntimeUnavailableError  a backend that is not installed, or has no device here
    ├── PlanError              a graph that TensorRT cannot build
    │   └── PlanMismatchError  a plan that is not for this GPU, library, graph or size
    ├── RenderError            a render that produced no valid picture
    │   └── RefusedError       a job that a renderer does not take on now
    └── InputError             a user's file or option that cannot be used

A message says what was expected, what was found and what to do. The command line prints it as it
stands and exits with status 1.
"""

from __future__ import annotations


class MeanCacheError(Exception):
    """Root of the tree above."""


class ScheduleError(MeanCacheError):
    """A schedule that is malformed, or does not fit what it is used for."""


class BundleError(MeanCacheError):
    """A bundle that is missing, damaged, or lacks what was asked for."""


class ExportError(MeanCacheError):
    """A checkpoint that cannot be exported, or an export that failed its checks."""


class CalibrationError(MeanCacheError):
    """Trajectories that are missing, inconsistent or not finite."""


class RuntimeUnavailableError(MeanCacheError):
    """A backend that is not installed, or has no device on this machine."""


class PlanError(MeanCacheError):
    """A graph that TensorRT cannot build."""


class PlanMismatchError(PlanError):
    """A plan that is missing or damaged, or not for this GPU, library, graph or size."""


class RenderError(MeanCacheError):
    """A render that produced no valid picture."""


class RefusedError(RenderError):
    """A job that a renderer does not take on: too many wait, or its deadline cannot be met.

    `retry_after_s` is when there may be room again, None where waiting does not help.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InputError(MeanCacheError):
    """A user's file or option that cannot be used."""
