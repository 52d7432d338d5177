"""The names of TensorRT's interface that our code touches, against each flavour's own."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorrt_rtx
from scripts.write_tensorrt_api import TARGET, members

import meancache_trt.engine.tensorrt as package

API: dict[str, dict[str, list[str]]] = json.loads(TARGET.read_text())
FILES = sorted(Path(package.__file__).parent.glob("*.py"))
KNOWN = {
    name for classes in API.values() for names in (classes, *classes.values()) for name in names
}


BEHIND = {
    "ComputeCapability": "set_compute_capability",
    "num_compute_capabilities": "set_compute_capability",
    "DynamicShapesKernelSpecializationStrategy": "dynamic_shapes_kernel_specialization_strategy",
    "EAGER": "dynamic_shapes_kernel_specialization_strategy",
    "EngineValidity": "get_engine_validity",
    "INVALID": "get_engine_validity",
    "set_runtime_cache": "create_runtime_cache",
    "deserialize": "create_runtime_cache",  # of a runtime cache
}
"""Names that are reached only where the one behind which they stand was found."""


def names_of(classes: dict[str, list[str]]) -> set[str]:
    return {*classes, *(name for names in classes.values() for name in names)}


def touched() -> set[str]:
    """Attributes that our code takes, as far as they are TensorRT's."""
    return {
        node.attr for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    } & KNOWN


def asked_for() -> set[str]:
    """Names that our code looks for before it uses them, by `hasattr` or `in`."""
    nodes = [node for tree in trees() for node in ast.walk(tree)]
    looked_for = [
        node.args[1]
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr")
    ]
    looked_for += [node.left for node in nodes if isinstance(node, ast.Compare)]
    return {str(node.value) for node in looked_for if isinstance(node, ast.Constant)}


def trees() -> Iterator[ast.Module]:
    yield from (ast.parse(path.read_text()) for path in FILES)


def test_table_is_that_of_the_installed_library() -> None:
    recorded = API["tensorrt_rtx"]
    assert {name: members(tensorrt_rtx, name) for name in recorded} == recorded


@pytest.mark.parametrize("flavour", sorted(API))
def test_every_name_exists_or_is_asked_for(flavour: str) -> None:
    assert "execute_async_v3" in touched()
    missing = touched() - names_of(API[flavour])
    assert {BEHIND.get(name, name) for name in missing} <= asked_for()


def test_every_exception_is_in_use() -> None:
    assert BEHIND.keys() <= touched()


def test_names_that_only_one_flavour_has_are_in_use() -> None:
    # Otherwise the test above would pass for want of differences.
    assert touched() & (names_of(API["tensorrt_rtx"]) - names_of(API["tensorrt 11.1"]))
