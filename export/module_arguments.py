"""A transformer's arguments as its graph's inputs, where those are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meancache_trt.export.family import Configs


def graph_inputs(configs: Configs, arguments: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """Names and units are the module's own."""
    return dict(arguments)
