"""How much memory a build takes, said before it starts."""

from __future__ import annotations

from meancache_trt.engine.memory import available_bytes
from meancache_trt.errors import PlanError

WEIGHTS_FACTOR = 3.4
BASE_BYTES = 350_000_000
KERNEL_BYTES = 15_000_000


def predicted_peak_bytes(weight_bytes: int) -> int:
    """The largest resident size of a build whose graph has so many bytes of weights."""
    return BASE_BYTES + int(WEIGHTS_FACTOR * weight_bytes)


def plan_bytes(weight_bytes: int) -> int:
    """About what the plan of a graph with so many bytes of weights takes on disk."""
    return KERNEL_BYTES + weight_bytes


def check_memory(what: str, weight_bytes: int) -> None:
    """Raise `PlanError` where a build is expected to take more memory than there is."""
    wanted, there = predicted_peak_bytes(weight_bytes), available_bytes()
    if wanted > there:
        raise PlanError(
            f"building {what} is expected to take {wanted / 1e9:.1f} GB of memory, found "
            f"{there / 1e9:.1f} GB available; free some, build on a machine with more (one without "
            "a GPU will do with --compute-capability), or go on with --skip-memory-check"
        )
