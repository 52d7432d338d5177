from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.cli.output import print_table
from meancache_trt.doctor import Report, Verdict, builds_for, examine
from meancache_trt.engine.probe import Driver, Gpu, probe
from meancache_trt.engine.survey import LibraryState, survey
from meancache_trt.engine.tensorrt.record import PlanFile, PlanKey, PlanRecord
from meancache_trt.engine.tensorrt.store import graph_digest
from meancache_trt.meancache.files import encode_json
from tests.fake_driver import driver_environment

GIB = 2**30
HAS_DRIVER = probe().cuda_version is not None
no_driver = pytest.mark.skipif(HAS_DRIVER, reason="this machine has an NVIDIA driver")


@pytest.fixture
def driver(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Compile a driver with some macros; an environment in which it is found first."""
    return functools.partial(driver_environment, tmp_path)


def doctor(environment: dict[str, str] | None, *arguments: object) -> Report:
    command = [sys.executable, "-m", "meancache_trt.cli", "doctor", "--json"]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, check=True
    )
    return msgspec.json.decode(done.stdout, type=Report)


def flavour(report: Report, name: str) -> Any:
    return next(found for found in report.flavours if found.name == name)


def test_a_gpu_is_described_as_its_driver_does(driver):
    found = doctor(driver()).driver
    gpu = Gpu(0, "Fake GPU", "8.9", total_bytes=24 * GIB, free_bytes=20 * GIB)
    assert found == Driver(cuda_version="13.1", problem=None, gpus=(gpu,))


@pytest.mark.parametrize(("major", "minor", "is_usable"), [(8, 9, True), (9, 0, False)])
def test_tensorrt_for_rtx_is_said_to_build_for_its_gpus_alone(driver, major, minor, is_usable):
    pytest.importorskip("tensorrt_rtx")
    report = doctor(driver(f"MAJOR={major}", f"MINOR={minor}"))
    verdict = flavour(report, "tensorrt_rtx").gpus["0"]
    assert verdict.is_usable == is_usable
    assert is_usable or "7.5, 8.0, 8.6, 8.9, 12.0" in verdict.why


def test_a_driver_that_hangs_is_given_up(driver):
    begin = time.monotonic()
    report = doctor(driver("HANGS"), "--timeout", 1)
    assert report.driver.problem == "the NVIDIA driver does not answer within 1 s"
    assert time.monotonic() - begin < 60  # cuInit sleeps for ten minutes


def test_a_driver_that_refuses_is_said_to(driver):
    report = doctor(driver("STATUS=100"))  # CUDA_ERROR_NO_DEVICE
    assert report.driver.problem == "the NVIDIA driver is there, but cuInit returned 100"
    assert report.driver.gpus == ()


@no_driver
def test_without_a_driver_it_says_so_and_what_runs_instead():
    report = doctor(None)
    assert "there is no NVIDIA driver" in (report.driver.problem or "")
    assert report.auto.name == "onnxruntime"
    assert not report.driver.gpus


def test_it_prints_tables_for_people(driver):
    command = [sys.executable, "-m", "meancache_trt.cli", "doctor"]
    out = subprocess.run(command, env=driver(), capture_output=True, text=True, check=True).stdout
    assert "NVIDIA driver for CUDA up to 13.1" in out
    assert "20.0 GiB  24.0 GiB" in out
    assert "auto: " in out


def test_extras_are_printed_as_they_are_installed(capsys):
    print_table(["package", ""], [["x", "pip install 'meancache-trt[cpu]'"]])
    assert "meancache-trt[cpu]" in capsys.readouterr().out


def test_a_bundle_is_described_for_people(bundle, driver):
    command = [sys.executable, "-m", "meancache_trt.cli", "doctor", str(bundle)]
    out = subprocess.run(command, env=driver(), capture_output=True, text=True, check=True).stdout
    assert "schedule b10, 10 evaluations: usable, fits 64x64" in out
    assert "no plans; `meancache-trt plan` builds them" in out


def test_a_library_that_cannot_be_imported_is_named_with_its_words(tmp_path):
    (tmp_path / "broken_library.py").write_text("raise OSError('libnvinfer.so.11 is not there')")
    script = "from meancache_trt.engine.survey import survey; print(survey(['broken_library']))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "cannot be imported: OSError: libnvinfer.so.11 is not there" in done.stdout


def test_a_library_that_hangs_is_given_up(tmp_path):
    (tmp_path / "slow_library.py").write_text("import time; time.sleep(600)")
    script = (
        "from meancache_trt.engine.survey import survey;"
        "print(survey(['slow_library'], timeout_s=0.5))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "not imported within 0.5 s" in done.stdout


def test_the_survey_imports_nothing_here():
    script = (
        "import sys; from meancache_trt.engine.survey import survey; survey();"
        "sys.exit(len({'onnxruntime', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_what_is_not_installed_builds_for_nothing():
    (state,) = survey(["no_such_library"]).values()
    gpu = Gpu(0, "Fake GPU", "8.9", GIB, GIB)
    assert builds_for(state, gpu) == Verdict(is_usable=False, why="not installed")


def test_the_data_centre_library_builds_on_any_gpu():
    gpu = Gpu(0, "Fake GPU", "9.0", GIB, GIB)
    state = LibraryState("tensorrt", "11.1.0")
    assert builds_for(state, gpu) == Verdict(is_usable=True, why="builds on the GPU itself")


def add_plan(bundle: Bundle, capability: str, *, graph: str | None = None) -> None:
    """A sidecar of the prepare graph, as the installed TensorRT for RTX would have it."""
    component = bundle.export.components["prepare"]
    version = survey(["tensorrt_rtx"])["tensorrt_rtx"].version or "1.7.1.116"
    record = PlanRecord(
        key=PlanKey(
            component="prepare",
            graph=graph or graph_digest(bundle, component),
            precision="float32",
            profile={},
            flavour="tensorrt_rtx",
            version=version,
            compute_capability=capability,
        ),
        inputs={},
        outputs={},
        file=PlanFile(f"plans/prepare-{capability}.plan", 0, ""),
        fused_attention=0,
        build_s=0.0,
        peak_memory_bytes=0,
        built_at="2026-01-01T00:00:00Z",
    )
    bundle.add_file(f"plans/prepare-{capability}-{graph}", encode_json(record))


def test_a_bundles_plans_are_said_to_fit_or_why_not(bundle, driver):
    pytest.importorskip("tensorrt_rtx")
    opened = Bundle.open(bundle)
    add_plan(opened, "8.9")
    add_plan(opened, "12.0")
    add_plan(opened, "8.9", graph="another")
    report = doctor(driver(), bundle).bundle
    assert report is not None
    found = {plan.path: plan.verdict for plan in report.plans if plan.verdict.is_usable}
    whys = sorted(plan.verdict.why for plan in report.plans if not plan.verdict.is_usable)
    assert list(found) == ["plans/prepare-8.9.plan"]
    assert whys == ["it was built from another graph", "the GPU's compute capability is 8.9"]


def test_a_bundles_schedules_are_listed_with_the_default(bundle):
    report = examine(Bundle.open(bundle)).bundle
    assert report is not None
    assert [schedule.name for schedule in report.schedules] == ["full", "b10", "b6"]
    assert all(schedule.verdict.is_usable for schedule in report.schedules)
    assert report.schedule.name == "full"


def test_what_is_no_bundle_is_refused(tmp_path):
    command = [sys.executable, "-m", "meancache_trt.cli", "doctor", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected a bundle" in done.stderr


def test_the_json_has_all_parts():
    command = [sys.executable, "-m", "meancache_trt.cli", "doctor", "--json"]
    facts = json.loads(subprocess.check_output(command))
    assert {"packages", "driver", "flavours", "onnxruntime", "backends", "auto"} <= facts.keys()
