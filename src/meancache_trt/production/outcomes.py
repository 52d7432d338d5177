"""What becomes of a job that a renderer was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from meancache_trt.errors import RefusedError
from meancache_trt.production.waiting import Entry

OutcomeKind = Literal["done", "late", "failed", "refused", "expired", "cancelled"]
"""What became of a job: rendered, rendered after its deadline, failed, refused when it came, given
up while it waited because its deadline could not be met any more, cancelled."""

OnOutcome = Callable[["Outcome"], None]


@dataclass(frozen=True)
class Outcome:
    """The end of a job. `latency_ms` is from `submit` on; `predicted_ms` what `submit` foretold.

    That is 0 for jobs that were refused when they came.
    """

    kind: OutcomeKind
    latency_ms: float
    predicted_ms: float

    @classmethod
    def of(cls, kind: OutcomeKind, entry: Entry) -> Outcome:
        """The end, now, of a job; one that is done may be late."""
        now = time.monotonic()
        ended: OutcomeKind = "late" if kind == "done" and now > entry.deadline else kind
        return cls(ended, 1e3 * (now - entry.submitted), entry.predicted_ms)


def too_late(entry: Entry) -> RefusedError:
    """Why a job that waited was given up."""
    waited_s = time.monotonic() - entry.submitted
    return RefusedError(
        f"the job waited {waited_s:.3g} s and could not be done any more by its deadline, "
        f"{entry.deadline - entry.submitted:.3g} s after it came; nothing was rendered. Allow more "
        "time, or send less at a time"
    )
