"""Builds by the real library, ahead of time, and what its refusals become."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from meancache_trt.engine.tensorrt.builder import build
from meancache_trt.engine.tensorrt.library import load_library
from meancache_trt.engine.tensorrt.record import BuildOptions, PlanTensor, ShapeRange
from meancache_trt.engine.tensorrt.target import known_capabilities, precisions_for
from meancache_trt.errors import InputError, PlanError
from meancache_trt.meancache.hashing import sha256_of
from tests.engine.tensorrt.jobs import build_alone, make_job, write_update

FROM_ONE_TO_FOUR = ShapeRange((1, 4), (2, 4), (4, 4))


def write_graph(
    folder: Path, operator: str, *inputs: str, dtype: int = TensorProto.FLOAT, name: str = "graph"
) -> Path:
    """One node over inputs of (batch, 4)."""
    values = [helper.make_tensor_value_info(one, dtype, ["batch", 4]) for one in inputs]
    output = helper.make_tensor_value_info("made", dtype, ["batch", 4])
    node = helper.make_node(operator, list(inputs), ["made"])
    graph = helper.make_graph([node], "graph", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def test_a_plan_is_described_by_its_network_definition(tmp_path: Path) -> None:
    component, profile = write_update(tmp_path, 2)
    job = make_job(tmp_path / component.path, tmp_path, profile)
    built = build(job)
    plan = Path(job.plan)
    assert (built.size_bytes, built.sha256) == (plan.stat().st_size, sha256_of(plan))
    for described, records in (
        (built.inputs, component.inputs),
        (built.outputs, component.outputs),
    ):
        expected = {
            name: PlanTensor(
                record.dtype, tuple(-1 if isinstance(size, str) else size for size in record.shape)
            )
            for name, record in records.items()
        }
        assert described == expected
    assert (built.attention, built.fused_attention) == (0, 0)
    assert built.build_s > 0
    # The library alone has 100 MB; a gigabyte would be another process's.
    assert built.peak_memory_bytes > 50e6


def test_a_file_that_is_no_graph_is_refused_with_tensorrts_words(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(PlanError, match=r"cannot parse .*broken\.onnx: .*MODEL_DESERIALIZE_FAILED"):
        build_alone(path, tmp_path, {})


def test_a_missing_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot parse .*none\.onnx: .*cannot be found"):
        build_alone(tmp_path / "none.onnx", tmp_path, {})


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "Frobnicate", "one")
    with pytest.raises(PlanError, match="operator: Frobnicate"):
        build_alone(path, tmp_path, {"one": FROM_ONE_TO_FOUR})


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, "input one is dynamic, -1x4; give its shapes"),
        ({"two": FROM_ONE_TO_FOUR}, "shapes of the inputs one, found two"),
        ({"one": ShapeRange((1,), (2,), (4,))}, "input one has 2 axes, -1x4; found 1/2/4"),
        ({"one": ShapeRange((2, 4), (1, 4), (4, 4))}, "ascending; found 2x4/1x4/4x4"),
        ({"one": ShapeRange((1, 5), (1, 5), (1, 5))}, "fixed to -1x4 where not -1; found 1x5"),
    ],
)
def test_shapes_that_an_input_cannot_have_are_refused(
    tmp_path: Path, profile: dict[str, ShapeRange], message: str
) -> None:
    path = write_graph(tmp_path, "Neg", "one")
    with pytest.raises(PlanError, match=message):
        build_alone(path, tmp_path, profile)


def test_a_profile_outside_of_what_the_graph_can_compute_is_refused(tmp_path: Path) -> None:
    # Each input may have its shape; together they cannot be concatenated and reshaped to (8, 4).
    values = [helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in ("one", "two")]
    constant = helper.make_tensor("shape", TensorProto.INT64, [2], [8, 4])
    nodes = [
        helper.make_node("Concat", ["one", "two"], ["both"], axis=0),
        helper.make_node("Reshape", ["both", "shape"], ["made"]),
    ]
    output = helper.make_tensor_value_info("made", 1, [8, 4])
    graph = helper.make_graph(nodes, "graph", values, [output], [constant])
    path = tmp_path / "fixed.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    many = ShapeRange((16, 4), (16, 4), (32, 4))
    with pytest.raises(PlanError, match=r"cannot build fixed for .* 8\.9: ") as found:
        build_alone(path, tmp_path, {"one": many, "two": many})
    assert "cudaError 35" not in str(found.value)  # what is said of the missing driver besides


def test_a_compute_capability_that_the_library_lacks_is_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "Neg", "one")
    with pytest.raises(PlanError, match=r"builds for 7\.5, .*8\.9, .*, found 9\.0; .*tensorrt"):
        build_alone(path, tmp_path, {"one": FROM_ONE_TO_FOUR}, capability="9.0")
    with pytest.raises(InputError, match=r"such as 8\.9, found 'ada'"):
        build_alone(path, tmp_path, {"one": FROM_ONE_TO_FOUR}, capability="ada")


@pytest.mark.parametrize("capability", known_capabilities(load_library("tensorrt_rtx")))
def test_bfloat16_builds_for_the_capabilities_that_are_said_to_have_it(
    tmp_path: Path, capability: str
) -> None:
    path = write_graph(tmp_path, "Mul", "one", "two", dtype=TensorProto.BFLOAT16)
    profile = {"one": FROM_ONE_TO_FOUR, "two": FROM_ONE_TO_FOUR}
    if "bfloat16" in precisions_for(capability):
        assert build_alone(path, tmp_path, profile, capability=capability).size_bytes
    else:
        with pytest.raises(PlanError, match="HW-specific datatypes: b16"):
            build_alone(path, tmp_path, profile, capability=capability)


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(builder_optimization_level=0),
        BuildOptions(workspace_bytes=1 << 30),
        BuildOptions(weight_streaming=True),
        BuildOptions(tiling_optimization_level="full"),
        BuildOptions(max_aux_streams=0),
    ],
)
def test_every_option_that_the_library_has_builds(tmp_path: Path, options: BuildOptions) -> None:
    path = write_graph(tmp_path, "Neg", "one")
    assert build_alone(path, tmp_path, {"one": FROM_ONE_TO_FOUR}, options=options).size_bytes


def test_an_option_that_the_library_ignores_is_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "Neg", "one")
    options = BuildOptions(hardware_compatibility="ampere_plus")
    with pytest.raises(PlanError, match=r"setHardwareCompat\w+\(\) is unsupported.*Leave it"):
        build_alone(path, tmp_path, {"one": FROM_ONE_TO_FOUR}, options=options)


def test_a_build_that_is_told_to_stop_stops(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "Neg", "one")
    job = make_job(path, tmp_path, {"one": FROM_ONE_TO_FOUR})
    with pytest.raises(PlanError, match="Build canceled by user"):
        build(job, advance=lambda _: False)
    assert not Path(job.plan).exists()


def test_progress_goes_from_nothing_to_all_and_never_back(tmp_path: Path) -> None:
    shares: list[float] = []

    def advance(share: float) -> bool:
        shares.append(share)
        return True

    component, profile = write_update(tmp_path, 4)
    build(make_job(tmp_path / component.path, tmp_path, profile), advance=advance)
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert shares[-1] == 1
    assert len(set(shares)) > 10


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "Neg", "one")
    full = tmp_path / "graph.plan"
    full.symlink_to("/dev/full")
    with pytest.raises(PlanError, match=r"cannot write the plan .*No space left.*make room"):
        build_alone(path, tmp_path, {"one": FROM_ONE_TO_FOUR})


def test_a_plan_of_another_version_than_asked_for_is_not_built(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "Neg", "one")
    job = make_job(path, tmp_path, {"one": FROM_ONE_TO_FOUR})
    key = msgspec.structs.replace(job.key, version="1.0")
    with pytest.raises(PlanError, match=r"expected tensorrt_rtx 1\.0, found 1\.[1-9]"):
        build(msgspec.structs.replace(job, key=key))
