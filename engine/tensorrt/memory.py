"""How much memory a build takes, said before it starts.

Measured with TensorRT for RTX 1.7 on a FLUX.1 of 687 M parameters and its encoders and VAE
(`scripts/prove plan-memory`): the weights are mapped once as they are stored, and are in memory
twice as they are built, when the engine is being serialised. For weights stored as they are built
that is 3.1 times their size, and the libraries.
"""

from __future__ import annotations

from meancache_trt.engine.memory import available_bytes
from meancache_trt.errors import PlanError

_BASE_BYTES = 300_000_000
_PER_STORED_BYTE = 1.1
_PER_BUILT_BYTE = 2.0
_KERNEL_BYTES = 15_000_000


def predicted_peak_bytes(stored_bytes: int, built_bytes: int) -> int:
    """The largest resident size of a build.

    `stored_bytes` are the weights' in their files, `built_bytes` the same weights' in the precision
    that the engine holds them in.
    """
    return _BASE_BYTES + int(_PER_STORED_BYTE * stored_bytes + _PER_BUILT_BYTE * built_bytes)


def predicted_plan_bytes(built_bytes: int) -> int:
    """About what a plan takes on disk: its weights, and kernels."""
    return _KERNEL_BYTES + built_bytes


def check_memory(what: str, stored_bytes: int, built_bytes: int) -> None:
    """Raise `PlanError` where a build is expected to take more memory than there is."""
    wanted, there = predicted_peak_bytes(stored_bytes, built_bytes), available_bytes()
    if wanted > there:
        raise PlanError(
            f"building {what} is expected to take {wanted / 1e9:.1f} GB of memory, found "
            f"{there / 1e9:.1f} GB available; free some, build on a machine with more (one without "
            "a GPU will do with --compute-capability), or go on with --skip-memory-check"
        )
