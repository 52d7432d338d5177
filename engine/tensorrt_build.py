"""TensorRT plans from ONNX graphs, built ahead of time.

TensorRT for RTX builds for any of its compute capabilities on any machine, without a GPU or a
driver. `tensorrt`, the data-centre library, builds on the GPU that the plan is for; with a
capability asked for it is refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meancache_trt.errors import PlanError, RuntimeUnavailableError

Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""Input name -> smallest, most frequent and largest shape."""

_LIBRARIES = ("tensorrt_rtx", "tensorrt")
_FUSED_ATTENTION = re.compile(rb"_gemm_mha_v2_0x[0-9a-f]+")


def build_plan(graph: Path, shapes: Shapes, compute_capabilities: Sequence[str] = ()) -> bytes:
    """Build a strongly typed graph for inputs of `shapes`.

    Args:
        graph: an ONNX file; weights beside it are read from where it says.
        shapes: for every input with a dynamic dimension.
        compute_capabilities: such as ("8.9", "12.0"), for TensorRT for RTX; none means the GPU at
            hand.

    Raises:
        PlanError: where TensorRT refuses, with its own words.
        RuntimeUnavailableError: where no TensorRT is installed.
    """
    library = _library()
    logger = _logger(library)
    builder = library.Builder(logger)
    network = _parsed(library, builder, logger, graph)
    config = builder.create_builder_config()
    if config.add_optimization_profile(_profile(builder, network, shapes)) < 0:
        raise PlanError(f"{library.__name__} refuses the shapes for {graph}: {logger.reason()}")
    _target(library, config, compute_capabilities)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanError(f"{library.__name__} cannot build {graph}: {logger.reason()}")
    return bytes(plan)


def fused_attention_kernels(plan: bytes) -> set[str]:
    """Names of the fused attention kernels in a plan; without them a transformer is slow."""
    return {name.decode() for name in _FUSED_ATTENTION.findall(plan)}


def _library() -> Any:
    for name in _LIBRARIES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise RuntimeUnavailableError(
        f"plans need one of the packages {' or '.join(_LIBRARIES)}, found neither; run "
        "`pip install 'meancache-trt[rtx]'`"
    )


def _logger(library: Any) -> Any:
    """A logger that keeps errors, since TensorRT returns None and says why only there."""

    class Logger(library.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.Severity.ERROR:
                self.errors.append(message)

        def reason(self) -> str:
            return "; ".join(self.errors) or "it does not say why"

    return Logger()


def _parsed(library: Any, builder: Any, logger: Any, graph: Path) -> Any:
    flag = library.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = library.OnnxParser(network, logger)
    # By path: the weights beside it are found from there, and protobuf ends at 2 GB.
    if not parser.parse_from_file(str(graph)):
        reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise PlanError(
            f"{library.__name__} {library.__version__} cannot parse {graph}: "
            f"{'; '.join(reasons) or logger.reason()}"
        )
    return network


def _profile(builder: Any, network: Any, shapes: Shapes) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 not in tensor.shape:
            continue
        if tensor.name not in shapes:
            raise PlanError(f"input {tensor.name} is dynamic; give its shapes, found {[*shapes]}")
        profile.set_shape(tensor.name, *shapes[tensor.name])
    return profile


def _target(library: Any, config: Any, compute_capabilities: Sequence[str]) -> None:
    if not compute_capabilities:
        return
    if not hasattr(config, "set_compute_capability"):
        raise PlanError(
            f"{library.__name__} builds for the GPU at hand, found compute capabilities "
            f"{', '.join(compute_capabilities)}; leave them out or install tensorrt-rtx"
        )
    known = library.ComputeCapability.__members__
    config.num_compute_capabilities = len(compute_capabilities)
    for index, capability in enumerate(compute_capabilities):
        name = f"SM{capability.replace('.', '')}"
        if name not in known:
            raise PlanError(
                f"{library.__name__} {library.__version__} builds for {', '.join(known)}, found "
                f"{capability}; leave it out, or build with `tensorrt` on that GPU"
            )
        if not config.set_compute_capability(known[name], index):
            raise PlanError(f"{library.__name__} refuses to build for {capability}")
