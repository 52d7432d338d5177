"""What a plan may be built for: compute capabilities, and the precision that suits each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from meancache_trt.engine.tensorrt.library import Library
from meancache_trt.errors import InputError, PlanError

_CAPABILITY = re.compile(r"([1-9][0-9]?)\.([0-9])")
_FIRST_WITH_BFLOAT16 = (8, 0)  # CUDA C++ Programming Guide, arithmetic instructions: Ampere


def parse_capability(text: str) -> tuple[int, int]:
    """Major and minor of a compute capability such as "8.9". Raises `InputError` otherwise."""
    found = _CAPABILITY.fullmatch(text)
    if found is None:
        raise InputError(f"a compute capability is such as 8.9, found {text!r}")
    return int(found[1]), int(found[2])


def has_bfloat16(capability: str) -> bool:
    """Whether GPUs of a compute capability compute in bfloat16."""
    return parse_capability(capability) >= _FIRST_WITH_BFLOAT16


def precisions_for(capability: str) -> tuple[str, ...]:
    """Which graph of a network suits a compute capability, the preferred first.

    bfloat16 goes before float16, whose range these models exceed; Turing, 7.5, lacks it.
    """
    low = ("bfloat16", "float16") if has_bfloat16(capability) else ("float16",)
    return (*low, "float32")


def builds_ahead(library: Library) -> bool:
    """Whether a library builds for GPUs that are not here."""
    return hasattr(library.module.IBuilderConfig, "set_compute_capability")


def known_capabilities(library: Library) -> list[str]:
    """Those that a library builds for ahead of time, such as "8.9"; empty where it does not."""
    if not builds_ahead(library):
        return []
    names = [name for name in library.module.ComputeCapability.__members__ if name[:2] == "SM"]
    return [f"{name[2:-1]}.{name[-1]}" for name in names]


def check_capabilities(library: Library, wanted: Sequence[str]) -> None:
    """Raise where a library cannot build ahead of time for one of `wanted`.

    `InputError` for what is no compute capability, else `PlanError` that says which there are.
    """
    for capability in wanted:
        parse_capability(capability)
    if not builds_ahead(library):
        raise PlanError(
            f"{library.flavour} builds for the GPU at hand, found compute capabilities "
            f"{', '.join(wanted)}; leave them out or use tensorrt_rtx"
        )
    known = known_capabilities(library)
    for capability in wanted:
        if capability not in known:
            raise PlanError(
                f"{library.flavour} {library.version} builds for {', '.join(known)}, found "
                f"{capability}; leave it out, or build with `--backend tensorrt` on that GPU"
            )
