"""What `plan` and `build` ask of TensorRT's builder, by the names of trtexec."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from meancache_trt.engine.tensorrt.record import (
    BuildOptions,
    HardwareCompatibility,
    TilingOptimization,
)
from meancache_trt.engine.tensorrt.target import parse_capability
from meancache_trt.errors import InputError
from meancache_trt.plan_targets import PlanOptions

Command = Callable[..., None]

_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*([KMGT]?)(?:iB|B)?", re.IGNORECASE)
_MIB = 2**20
_UNITS = {"": _MIB, "K": 2**10, "M": _MIB, "G": 2**30, "T": 2**40}
_HIGHEST_LEVEL = 5  # what IBuilderConfig.builder_optimization_level documents


class CapabilityList(click.ParamType[tuple[str, ...]]):
    """Compute capabilities with commas between them, such as 8.9,12.0."""

    name = "capabilities"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split; a usage error for what is no compute capability."""
        if isinstance(value, tuple):
            return value
        given = tuple(part.strip() for part in str(value).split(","))
        try:
            for capability in given:
                parse_capability(capability)
        except InputError as error:
            self.fail(f"{error}; several are 8.9,12.0", param, ctx)
        return given


class Mebibytes(click.ParamType[int]):
    """Bytes from mebibytes, as trtexec's memPoolSize takes them, or from 512M or 4G."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Bytes; a usage error for anything else than a size above 0."""
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(str(value).strip())
        size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
        if size < 1:
            self.fail(f"{value!r} is no size in MiB such as 4096, nor such as 4G", param, ctx)
        return size


_OPTIONS = (
    click.option(
        "--compute-capability",
        "compute_capabilities",
        type=CapabilityList(),
        default=(),
        metavar="8.9,12.0",
        help="GPUs to build TensorRT for RTX plans for, which need not be here; by default the one "
        "that is.",
    ),
    click.option(
        "--timing-cache",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File of kernel timings that builds share; by default in the user's cache directory.",
    ),
    click.option(
        "--builder-optimization-level",
        type=click.IntRange(0, _HIGHEST_LEVEL),
        help="How long TensorRT may search; its own default is 3.",
    ),
    click.option(
        "--workspace",
        "workspace_bytes",
        type=Mebibytes(),
        metavar="MIB",
        help="Limit of scratch memory on the GPU, in MiB or such as 4G; by default all of it.",
    ),
    click.option(
        "--weight-streaming",
        is_flag=True,
        help="Weights may stay in host memory and be streamed; no CUDA graph can then be captured.",
    ),
    click.option(
        "--hardware-compatibility",
        type=click.Choice(get_args(HardwareCompatibility)),
        default="none",
        show_default=True,
        help="Which other GPUs a plan of `tensorrt` is to run on.",
    ),
    click.option(
        "--tiling-optimization-level",
        type=click.Choice(get_args(TilingOptimization)),
        default="none",
        show_default=True,
        help="How long TensorRT may search for tiles that stay in the L2 cache.",
    ),
    click.option(
        "--max-aux-streams",
        type=click.IntRange(min=0),
        help="CUDA streams that an engine may use besides its own; by default TensorRT decides.",
    ),
    click.option(
        "--skip-memory-check",
        is_flag=True,
        help="Build although less memory is free than a build is expected to take.",
    ),
)


def options(command: Command) -> Command:
    """Give a command these options; it gets them as one `PlanOptions` named `planning`."""

    @functools.wraps(command)
    def with_planning(
        *,
        compute_capabilities: tuple[str, ...],
        timing_cache: Path | None,
        builder_optimization_level: int | None,
        workspace_bytes: int | None,
        weight_streaming: bool,
        hardware_compatibility: HardwareCompatibility,
        tiling_optimization_level: TilingOptimization,
        max_aux_streams: int | None,
        skip_memory_check: bool,
        **others: Any,
    ) -> None:
        planning = PlanOptions(
            compute_capabilities=compute_capabilities,
            timing_cache=timing_cache,
            is_memory_checked=not skip_memory_check,
            build=BuildOptions(
                builder_optimization_level=builder_optimization_level,
                workspace_bytes=workspace_bytes,
                weight_streaming=weight_streaming,
                hardware_compatibility=hardware_compatibility,
                tiling_optimization_level=tiling_optimization_level,
                max_aux_streams=max_aux_streams,
            ),
        )
        command(planning=planning, **others)

    given: Command = with_planning
    for option in reversed(_OPTIONS):
        given = option(given)
    return given
