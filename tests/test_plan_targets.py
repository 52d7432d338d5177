"""What is planned for, by what is asked for and what is here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from meancache_trt import plan_targets
from meancache_trt.engine.probe import Driver, Gpu
from meancache_trt.engine.tensorrt.library import Library, load_library
from meancache_trt.engine.tensorrt.record import BuildOptions
from meancache_trt.engine.tensorrt.target import (
    check_capabilities,
    known_capabilities,
    precisions_for,
)
from meancache_trt.errors import InputError, PlanError, RuntimeUnavailableError
from meancache_trt.plan_targets import PlanOptions, find_targets

ADA, HOPPER = "8.9", "9.0"


def put_gpu(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """Have this machine say that it has these GPUs and TensorRT for RTX."""
    gpus = tuple(
        Gpu(index, "a GPU", capability, 1 << 34, 1 << 34)
        for index, capability in enumerate(capabilities)
    )
    driver = Driver("13.0", None if gpus else "there is no NVIDIA driver", gpus)
    monkeypatch.setattr(plan_targets, "probe", lambda: driver)
    monkeypatch.setattr(plan_targets, "installed_flavours", lambda: ["tensorrt_rtx"])
    monkeypatch.setattr("meancache_trt.engine.probe.probe", lambda: driver)


def targets(backend: str, **options: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """(flavour, compute capability) of each target, and notes."""
    notes: list[str] = []
    found = find_targets(backend, PlanOptions(**options), note=notes.append)
    return [(target.library.flavour, target.capability) for target in found], notes


def test_compute_capabilities_mean_tensorrt_for_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu(monkeypatch, HOPPER)
    asked = ("8.9", "12.0", "8.9")
    expected = [("tensorrt_rtx", "8.9"), ("tensorrt_rtx", "12.0")]
    for backend in ("auto", "tensorrt_rtx"):
        assert targets(backend, compute_capabilities=asked) == (expected, [])


@pytest.mark.parametrize("backend", ["auto", "tensorrt_rtx"])
def test_the_gpu_at_hand_is_planned_for(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    put_gpu(monkeypatch, ADA, HOPPER)
    assert targets(backend) == ([("tensorrt_rtx", ADA)], [])


def test_a_gpu_that_nothing_builds_for_is_noted_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu(monkeypatch, HOPPER)
    found, (note,) = targets("auto")
    assert found == []
    assert "9.0" in note
    with pytest.raises(PlanError, match=r"found 9\.0; .*--backend tensorrt"):
        targets("tensorrt_rtx")


def test_without_a_gpu_it_is_said_how_to_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu(monkeypatch)
    found, (note,) = targets("auto")
    assert found == []
    assert "there is no NVIDIA driver; `--compute-capability 8.9` builds" in note
    with pytest.raises(RuntimeUnavailableError, match="give --compute-capability, such as"):
        targets("tensorrt_rtx")


@pytest.mark.parametrize(
    "options",
    [
        {"compute_capabilities": ("8.9",)},
        {"build": BuildOptions(weight_streaming=True)},
        {"timing_cache": "timings"},
    ],
)
def test_onnx_runtime_takes_no_plans(options: dict[str, Any]) -> None:
    assert targets("onnxruntime") == ([], [])
    with pytest.raises(InputError, match="onnxruntime takes no plans"):
        targets("onnxruntime", **options)


def test_the_library_at_hand_names_what_it_builds_for() -> None:
    known = known_capabilities(load_library("tensorrt_rtx"))
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= {*known}
    check_capabilities(load_library("tensorrt_rtx"), known)


def test_a_library_without_targets_builds_for_the_gpu_at_hand() -> None:
    """As `tensorrt` is: its builder's configuration has no set_compute_capability."""
    module = SimpleNamespace(IBuilderConfig=SimpleNamespace())
    library = Library("tensorrt", "11.1.0", module)
    assert known_capabilities(library) == []
    with pytest.raises(PlanError, match=r"builds for the GPU at hand.*use tensorrt_rtx"):
        check_capabilities(library, [ADA])


def test_turing_has_no_bfloat16() -> None:
    assert precisions_for("7.5") == ("float16", "float32")
    assert precisions_for("8.0") == precisions_for("12.1") == ("bfloat16", "float16", "float32")
