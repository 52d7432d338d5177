"""Build a plan of one addition for the GPU at hand and load it: `-m scripts.gpu.tiny_plan FLAVOUR`.

In a process of its own, since a library may end the process on a GPU that it does not know. Prints
what happened as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from meancache_trt.engine.tensorrt.library import ErrorLog, Library, load_library


def build(library: Library, log: ErrorLog) -> Any:
    """The plan, or None."""
    trt = library.module
    builder = trt.Builder(log.logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    given = network.add_input("x", trt.float32, (1, 8))
    layer = network.add_elementwise(given, given, trt.ElementWiseOperation.SUM)
    network.mark_output(layer.get_output(0))
    return builder.build_serialized_network(network, builder.create_builder_config())


def main() -> None:
    """Build, load, and say how far it went."""
    library = load_library(sys.argv[1])  # type: ignore[arg-type]
    log = ErrorLog(library)
    plan, engine = build(library, log), None
    steps = [f"built {plan.nbytes} bytes" if plan is not None else f"not built: {log.reason()}"]
    if plan is not None:
        runtime = library.module.Runtime(log.logger)
        engine = None if runtime is None else runtime.deserialize_cuda_engine(plan)
        steps.append("loaded" if engine is not None else f"not loaded: {log.reason()}")
    print(json.dumps({"said": ", ".join(steps), "is_loaded": engine is not None}))


if __name__ == "__main__":
    main()
