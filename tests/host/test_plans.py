"""Which plans the C++ host finds, against what the Python host finds in the same bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from scripts.host.building import run

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.library import Flavour, Library
from meancache_trt.engine.tensorrt.needs import check_plans, planned_precisions
from meancache_trt.engine.tensorrt.record import BuildOptions
from meancache_trt.engine.tensorrt.store import PlanStore
from meancache_trt.errors import MeanCacheError
from tests.fakes.plans import add_plan, plan_everything
from tests.host.conftest import Host

VERSION = "1.7.1.116"


def answer(ask: Callable[[], str]) -> str:
    """What is said, be it an error."""
    try:
        return ask()
    except MeanCacheError as error:
        return str(error)


def by_python(directory: Path, flavour: Flavour, version: str, capability: str) -> list[str]:
    """The lines that `plan_report` writes, by the Python host."""
    bundle = Bundle.open(directory)
    store, library = PlanStore(bundle), Library(flavour, version, ModuleType(flavour))

    def paths(name: str) -> str:
        found = store.loadable(
            name,
            bundle.export.components[name],
            flavour=flavour,
            version=version,
            capability=capability,
        )
        return ", ".join(store.checked_path(record).name for record in found)

    def everything() -> str:
        check_plans(bundle, library, capability)
        return "planned"

    def precisions() -> str:
        return ", ".join(planned_precisions(bundle, library, capability))

    return [
        *(f"{name}: {answer(lambda: paths(name))}" for name in sorted(bundle.export.components)),  # noqa: B023
        f"precisions: {answer(precisions)}",
        f"all: {answer(everything)}",
    ]


def check(host: Host, directory: Path, flavour: Flavour, version: str, capability: str) -> str:
    """Both hosts say the same; returns it."""
    program = host.build / "engine/host/tests/plan_report"
    found = run(program, directory, flavour, version, capability).splitlines()
    assert found == by_python(directory, flavour, version, capability)
    return "\n".join(found)


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(shared_bundle, tmp_path / "a.mcb", copy_function=os.link)
    return Bundle.open(tmp_path / "a.mcb")


def test_a_bundle_without_plans_is_told_how_to_get_them(host: Host, bundle: Bundle) -> None:
    said = check(host, bundle.directory, "tensorrt_rtx", VERSION, "8.9")
    assert "found none; build it with `meancache-trt plan" in said


def test_a_bundle_with_every_plan_can_be_rendered(host: Host, bundle: Bundle) -> None:
    plan_everything(bundle)
    version = PlanStore(bundle).records()[0].key.version
    said = check(host, bundle.directory, "tensorrt_rtx", version, "8.9")
    assert said.endswith("all: planned")
    for flavour, other, capability in (
        ("tensorrt", version, "8.9"),
        ("tensorrt_rtx", "1.0.0", "8.9"),
        ("tensorrt_rtx", version, "12.0"),
        ("tensorrt_rtx", version, "7.5"),
    ):
        said = check(host, bundle.directory, flavour, other, capability)  # type: ignore[arg-type]
        assert f"expected a plan of transformer by {flavour} {other} for" in said


def test_the_newest_of_several_plans_is_first(host: Host, bundle: Bundle) -> None:
    """Of another key each; one that is for every GPU from Ampere on is among them."""
    everywhere = BuildOptions(hardware_compatibility="ampere_plus")
    streamed = BuildOptions(weight_streaming=True, workspace_bytes=1 << 30)
    add_plan(bundle, "transformer", version=VERSION)
    add_plan(bundle, "transformer", version=VERSION, options=streamed)
    add_plan(bundle, "transformer", version=VERSION, compute_capability="8.0", options=everywhere)
    add_plan(bundle, "transformer", version="1.6.0.1")
    said = check(host, bundle.directory, "tensorrt_rtx", VERSION, "8.9")
    (line,) = [line for line in said.splitlines() if line.startswith("transformer: ")]
    assert line.count(".plan") == 3
    assert line.startswith("transformer: transformer.sm80.")
    assert "transformer.sm80." in check(host, bundle.directory, "tensorrt_rtx", VERSION, "12.0")


@pytest.mark.parametrize("damage", ["altered", "missing", "cut"])
def test_a_damaged_plan_is_refused(host: Host, bundle: Bundle, damage: str) -> None:
    record = add_plan(bundle, "prepare", version=VERSION)
    path = bundle.directory / record.file.path
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] + (b"!" if damage == "altered" else b""))
    said = check(host, bundle.directory, "tensorrt_rtx", VERSION, "8.9")
    assert ("cannot read" if damage == "missing" else "was altered") in said


def test_a_plan_of_another_graph_is_not_used(host: Host, bundle: Bundle) -> None:
    record = add_plan(bundle, "prepare", version=VERSION)
    name = f"plans/{Path(record.file.path).stem}"
    other = msgspec.structs.replace(record.key, graph="0" * 64)
    bundle.add_file(name, msgspec.json.encode(msgspec.structs.replace(record, key=other)))
    said = check(host, bundle.directory, "tensorrt_rtx", VERSION, "8.9")
    assert f"expected a plan of prepare by tensorrt_rtx {VERSION} for compute" in said
