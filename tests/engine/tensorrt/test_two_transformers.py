"""Plans of a model of two transformers: a render needs both, in one precision."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.library import Library
from meancache_trt.engine.tensorrt.needs import check_plans, planned_precisions
from meancache_trt.errors import PlanMismatchError
from meancache_trt.meancache.sigmas import SecondStage
from tests.fakes.plans import add_plan
from tests.fakes.tensorrt_base import VERSION
from tests.two_stages import with_second_stage

LIBRARY = Library("tensorrt_rtx", VERSION, ModuleType("tensorrt_rtx"))
CAPABILITY = "8.9"


def test_both_transformers_need_plans_of_one_precision(bundle: Bundle, tmp_path: Path) -> None:
    stage = SecondStage(boundary_timestep=500.0)
    two = with_second_stage(bundle, tmp_path / "two.mcb", stage)

    def precisions() -> tuple[str, ...]:
        return planned_precisions(two, LIBRARY, CAPABILITY)

    others = [name for name in two.export.components if not name.startswith("transformer")]
    for name in (*others, "transformer/bfloat16", "transformer_2"):
        add_plan(two, name)
    assert precisions() == ("bfloat16", "float16", "float32")
    with pytest.raises(PlanMismatchError, match=f"a plan of transformer by .* {CAPABILITY}"):
        check_plans(two, LIBRARY, CAPABILITY)
    add_plan(two, "transformer")
    assert precisions() == ("float32", "bfloat16", "float16")
    check_plans(two, LIBRARY, CAPABILITY)
    add_plan(two, "transformer_2/bfloat16")
    assert precisions() == ("bfloat16", "float32", "float16")
