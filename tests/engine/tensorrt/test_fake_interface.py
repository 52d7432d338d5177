"""The fake TensorRT has no attribute that TensorRT lacks."""

from __future__ import annotations

from typing import Any

import pytest
import tensorrt_rtx

from tests.engine.tensorrt.add_engine import AddEngine
from tests.fakes import tensorrt, tensorrt_base, tensorrt_context
from tests.fakes.cuda import FakeDevice


@pytest.mark.parametrize(
    "thing",
    [lambda engine: engine.runtime, lambda engine: engine.native, lambda e: e.context()],
)
def test_an_attribute_that_nobody_uses_is_not_there(engine: AddEngine, thing: Any) -> None:
    with pytest.raises(AttributeError):
        _ = thing(engine).name
    with pytest.raises(AttributeError):
        thing(engine).name = "a name"


PAIRS = [
    (tensorrt_base.ILogger, tensorrt_rtx.ILogger),
    (tensorrt.RuntimeRtx, tensorrt_rtx.Runtime),
    (tensorrt.ICudaEngineRtx, tensorrt_rtx.ICudaEngine),
    (tensorrt_context.IExecutionContextRtx, tensorrt_rtx.IExecutionContext),
    (tensorrt_context.IRuntimeConfigRtx, tensorrt_rtx.IRuntimeConfig),
    (tensorrt_context.IRuntimeCache, tensorrt_rtx.IRuntimeCache),
]


@pytest.mark.parametrize(("fake", "real"), PAIRS, ids=lambda kind: kind.__name__)
def test_the_library_has_every_attribute_of_the_fake(fake: type, real: type) -> None:
    names = [name for name in dir(fake) if not name.startswith("_")]
    assert names
    assert not [name for name in names if not hasattr(real, name)]
    for name in names:  # what is called in the one is called in the other
        assert callable(getattr(fake, name)) == callable(getattr(real, name)), name


@pytest.mark.parametrize(
    "name",
    [
        "DataType",
        "TensorIOMode",
        "TensorLocation",
        "ExecutionContextAllocationStrategy",
        "DynamicShapesKernelSpecializationStrategy",
        "EngineValidity",
        "EngineInvalidityDiagnostics",
    ],
)
def test_the_library_has_every_member_of_the_fakes_enums(name: str) -> None:
    real = getattr(tensorrt_rtx, name).__members__
    assert getattr(tensorrt_base, name).__members__.keys() <= real.keys()


def test_the_fakes_module_has_what_the_library_has() -> None:
    library, _ = tensorrt.fake_library(FakeDevice())
    assert not [name for name in vars(library.module) if not hasattr(tensorrt_rtx, name)]
