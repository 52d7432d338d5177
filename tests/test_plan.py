"""`plan`: what is built, what is used again, and what remains of a build that does not end well."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from scripts.graph_change import change_graph

from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.engine.probe import probe
from meancache_trt.engine.tensorrt.memory import check_memory, predicted_peak_bytes
from meancache_trt.engine.tensorrt.record import PlanRecord
from meancache_trt.engine.tensorrt.store import PlanStore
from meancache_trt.errors import PlanError
from meancache_trt.manifest import Component
from meancache_trt.meancache.files import write_json
from meancache_trt.plan import plan
from meancache_trt.plan_targets import PlanOptions, find_targets
from tests.engine.tensorrt.jobs import SLOW_HISTORY, make_bundle
from tests.test_cli import Run, run

__all__ = ["run"]  # a fixture

AHEAD = ("--compute-capability", "8.9")
COMMAND = (sys.executable, "-m", "meancache_trt.cli", "plan")
DEADLINE_S = 60.0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "small.mcb", 1, 2).directory


def planned(run: Run, *arguments: object) -> dict[str, bool]:
    """Component and GPU of each plan -> whether it was reused."""
    status, out, err = run("plan", *arguments, "--json")
    assert status == 0, err
    return reused_in(out)


def reused_in(printed: str) -> dict[str, bool]:
    return {
        f"{plan['key']['component']} {plan['key']['compute_capability']}": plan["is_reused"]
        for bundle in json.loads(printed)["bundles"]
        for plan in bundle["plans"]
    }


def replace_components(directory: Path, changed: dict[str, Component]) -> None:
    """A bundle whose manifest says something else of its components."""
    manifest = Bundle.open(directory).manifest
    export = msgspec.structs.replace(manifest.export, components=changed)
    write_json(directory / MANIFEST, msgspec.structs.replace(manifest, export=export).sealed())


def test_a_second_run_reuses_everything(run: Run, directory: Path) -> None:
    both = ("--compute-capability", "8.9,12.0")
    names = {f"update/h{n} {gpu}" for n in (1, 2) for gpu in ("8.9", "12.0")}
    bundle_id = Bundle.open(directory).manifest.bundle_id
    assert planned(run, directory, *both) == dict.fromkeys(names, False)
    assert planned(run, directory, *both) == dict.fromkeys(names, True)
    assert Bundle.open(directory).manifest.bundle_id == bundle_id
    status, _, err = run("plan", directory, *AHEAD)
    assert status == 0
    assert "update/h1 for 8.9: reused" in err
    assert planned(run, directory, *AHEAD, "--force") == {
        "update/h1 8.9": False,
        "update/h2 8.9": False,
    }


def test_another_option_builds_beside_what_is_there(run: Run, directory: Path) -> None:
    planned(run, directory, *AHEAD)
    assert not any(planned(run, directory, *AHEAD, "--max-aux-streams", 0).values())
    assert all(planned(run, directory, *AHEAD).values())
    assert len(PlanStore(Bundle.open(directory)).records()) == 4


def test_another_graph_builds_what_changed_and_nothing_else(run: Run, directory: Path) -> None:
    planned(run, directory, *AHEAD)
    change_graph(directory, "update/h2")
    assert planned(run, directory, *AHEAD) == {"update/h1 8.9": True, "update/h2 8.9": False}
    listed = json.loads(run("inspect", directory, "--json")[1])["plans"]
    assert [plan["is_current"] for plan in listed].count(False) == 1


def test_plans_of_other_graphs_and_versions_stay_until_they_are_pruned(
    run: Run, directory: Path
) -> None:
    planned(run, directory, *AHEAD)
    change_graph(directory, "update/h2")
    store = PlanStore(Bundle.open(directory))
    (current,) = (r for r in store.records() if r.key.component == "update/h1")
    older = msgspec.structs.replace(current.key, version="1.0")
    with store.lock(older), store.building(older) as file:
        file.write_bytes(store.checked_path(current).read_bytes())
        store.add(msgspec.structs.replace(current, key=older), file)
    assert "2 of the plans in" in run("plan", directory, *AHEAD)[2]
    assert len(PlanStore(Bundle.open(directory)).records()) == 4
    assert "removed" in run("plan", directory, *AHEAD, "--prune")[2]
    left = PlanStore(Bundle.open(directory)).records()
    assert {record.key.component for record in left} == {"update/h1", "update/h2"}
    assert len(files_in(directory)) == 2 * len(left) == 4
    assert "plans in" not in run("plan", directory, *AHEAD)[2]


def test_ranges_become_profiles_and_what_they_leave_out_is_noted(run: Run, directory: Path) -> None:
    status, out, err = run(
        "plan", directory, *AHEAD, "--batch", "1/2/4", "--height", "32/32/48", "--json"
    )
    assert status == 0
    record = json.loads(out)["bundles"][0]["plans"][0]
    # tokens are 8 x 8 pixels: 4 x 8 of them to 6 x 8
    assert record["key"]["profile"]["latent"] == {
        "min": [1, 32, 32],
        "opt": [2, 32, 32],
        "max": [4, 48, 32],
    }
    assert "the bundle lists height 64/64/64, its plans are for 32/32/48" in err
    assert "width" not in err
    (sizes,) = {
        json.dumps(plan["sizes"])
        for plan in json.loads(run("inspect", directory, "--json")[1])["plans"]
    }
    assert json.loads(sizes)["batch"] == {"min": 1, "opt": 2, "max": 4}


def test_several_bundles_are_planned_by_one_command(run: Run, tmp_path: Path) -> None:
    one, two = (make_bundle(tmp_path / f"{name}.mcb", 1).directory for name in ("one", "two"))
    status, out, err = run("plan", one, two, *AHEAD)
    assert status == 0
    assert out.index(str(one)) < out.index(str(two))
    assert "two.mcb: update/h1 for 8.9: built in" in err


def test_an_altered_plan_is_said_listed_and_built_again(run: Run, directory: Path) -> None:
    planned(run, directory, *AHEAD)
    record, other = PlanStore(Bundle.open(directory)).records()
    (directory / record.file.path).write_bytes(b"something else")
    status, out, err = run("inspect", directory, "--verify")
    assert status == 1
    assert out.count("unusable") == 1
    assert f"{record.file.path} was altered" in err
    assert other.file.path not in err
    status, _, err = run("plan", directory, *AHEAD)
    assert status == 0
    assert f"{record.file.path} was altered" in err
    assert run("inspect", directory, "--verify")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compute-capability", "9.0"), r"builds for .*8\.9, .*found 9\.0"),
        (("--height", "20", *AHEAD), "height is 20"),
        (("--frames", "5", *AHEAD), "makes pictures"),
        (("--backend", "onnxruntime", *AHEAD), "onnxruntime takes no plans"),
        (("--backend", "onnxruntime", "--weight-streaming"), "onnxruntime takes no plans"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_the_work(
    run: Run, directory: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = run("plan", directory, *arguments)
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    assert re.search(message, line)
    assert not (directory / "plans").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--compute-capability", "ada"),
        ("--compute-capability", "8.9;12.0"),
        ("--workspace", "much"),
        ("--workspace", "0"),
        ("--builder-optimization-level", "6"),
        ("--batch", "4/2/1"),
        ("--tiling-optimization-level", "some"),
        ("--max-aux-streams", "-1"),
    ],
)
def test_wrong_options_are_usage_errors(run: Run, directory: Path, option: str, value: str) -> None:
    status, out, err = run("plan", directory, option, value)
    assert (status, out) == (2, "")
    assert option in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096 << 20), ("4G", 4 << 30), ("1.5GiB", 3 << 29), ("512m", 1 << 29)],
)
def test_workspaces_are_mebibytes_as_in_trtexec(
    run: Run, directory: Path, text: str, size: int
) -> None:
    _, out, _ = run("plan", directory, *AHEAD, "--workspace", text, "--json")
    assert json.loads(out)["bundles"][0]["plans"][0]["key"]["options"]["workspace_bytes"] == size


def test_turing_is_not_given_bfloat16(run: Run, directory: Path) -> None:
    components = Bundle.open(directory).export.components
    rounded = msgspec.structs.replace(components["update/h1"], precision="bfloat16")
    replace_components(directory, {**components, "transformer/bfloat16": rounded})
    status, _, err = run("plan", directory, "--compute-capability", "8.9,7.5")
    assert status == 1
    assert "compute capability 7.5 has no bfloat16" in err
    assert "--precision float16" in err
    assert not (directory / "plans").exists()


def test_a_build_that_does_not_fit_is_refused_before_it_starts(run: Run, directory: Path) -> None:
    components = Bundle.open(directory).export.components
    huge = msgspec.structs.replace(components["update/h2"], weight_bytes=10**13)
    replace_components(directory, {**components, "update/h2": huge})
    status, _, err = run("plan", directory, *AHEAD)
    assert status == 1
    assert "update/h2 for 8.9 is expected to take 31000.3 GB of memory" in err
    assert "--skip-memory-check" in err
    status, _, err = run("plan", directory, *AHEAD, "--skip-memory-check")
    assert status == 1
    assert "free disk" in err
    assert not list((directory / "plans").glob("*.plan"))


def test_memory_is_predicted_from_weights_as_stored_and_as_built() -> None:
    # Measured: scripts/prove plan-memory, and its transformer in float32 over bfloat16 weights.
    for stored, built, measured in ((1.374e9, 1.374e9, 4.44e9), (1.374e9, 2.749e9, 7.19e9)):
        assert abs(predicted_peak_bytes(int(stored), int(built)) / measured - 1) < 0.25
    check_memory("little", 1, 1)
    with pytest.raises(PlanError, match=r"take 3[0-9]{5}\.[0-9] GB of memory, found .* available"):
        check_memory("much", 10**14, 10**14)


def test_a_machine_without_a_gpu_is_said_and_told_how_to_plan() -> None:
    if probe().gpus:
        pytest.skip("there is a GPU, for which plans would be built")
    notes: list[str] = []
    assert find_targets("auto", PlanOptions(), note=notes.append) == []
    (note,) = notes
    assert "--compute-capability 8.9" in note


def plan_while(directory: Path, during: Callable[[], object]) -> PlanRecord:
    """Plan a bundle of one graph for 8.9, and do something each time that progress is told."""

    @contextlib.contextmanager
    def progress(title: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: void(done, total, during())

    options = PlanOptions(compute_capabilities=("8.9",))
    targets = find_targets("auto", options, note=void)
    ((made,),) = plan([Bundle.open(directory)], targets, options, note=void, progress=progress)
    return made.record


def void(*_: object) -> None:
    """Nothing."""


def kill_workers() -> None:
    for child in psutil.Process().children():
        if "meancache_trt.engine.tensorrt.worker" in child.cmdline():
            child.kill()


def test_a_killed_build_leaves_the_bundle_as_it_was(tmp_path: Path) -> None:
    directory = make_bundle(tmp_path / "own.mcb", 64).directory
    before = (directory / MANIFEST).read_bytes()
    with pytest.raises(PlanError, match="was killed"):
        plan_while(directory, kill_workers)
    assert (directory / MANIFEST).read_bytes() == before
    assert files_in(directory) == set()
    record = plan_while(directory, void)
    assert PlanStore(Bundle.open(directory)).checked_path(record)


def test_a_plan_of_a_graph_that_changed_meanwhile_is_not_kept(tmp_path: Path) -> None:
    directory = make_bundle(tmp_path / "own.mcb", 16).directory
    with pytest.raises(PlanError, match=r"update/h16 in .* changed while .* plan again"):
        plan_while(directory, lambda: change_graph(directory, "update/h16"))
    assert files_in(directory) == set()


def files_in(directory: Path) -> set[str]:
    """What lies in plans/ besides locks."""
    return {path.name for path in (directory / "plans").iterdir() if path.suffix != ".lock"}


def wait_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def slow_command(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """`plan` in a session of its own, in the middle of a long build after a short one."""
    # Whoever starts the tests in the background may have had interrupts ignored.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from meancache_trt.cli import main; main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "plan", str(directory), *AHEAD],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )

    def is_building() -> bool:
        assert process.poll() is None
        names = files_in(directory) if (directory / "plans").exists() else set()
        children = psutil.Process(process.pid).children()
        return bool(children) and any(f"h{SLOW_HISTORY}" in name for name in names)

    try:
        wait_until(is_building)
        time.sleep(1)  # well into the build
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_keeps_what_is_whole_and_nothing_else(tmp_path: Path) -> None:
    directory = make_bundle(tmp_path / "own.mcb", 1, SLOW_HISTORY).directory
    with slow_command(directory) as process:
        workers = psutil.Process(process.pid).children()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 130
        assert err.splitlines()[-1] == "error: interrupted"
        assert "Traceback" not in err
        assert not any(worker.is_running() for worker in workers)
    (record,) = PlanStore(Bundle.open(directory)).records()
    assert record.key.component == "update/h1"
    assert files_in(directory) == {
        Path(record.file.path).name,
        *(Path(a.path).name for a in Bundle.open(directory).manifest.additions.values()),
    }


def test_what_a_killed_command_leaves_behind_goes_with_the_next(tmp_path: Path) -> None:
    directory = make_bundle(tmp_path / "own.mcb", 1, SLOW_HISTORY).directory
    with slow_command(directory) as process:
        (worker,) = psutil.Process(process.pid).children()
        process.kill()
        wait_until(lambda: not worker.is_running())
    store = PlanStore(Bundle.open(directory))
    assert len(store.records()) == 1
    (left,) = store.clean()
    assert left.suffix == ".building"


def test_two_commands_at_once_build_each_plan_once(tmp_path: Path) -> None:
    directory = make_bundle(tmp_path / "own.mcb", 1, 64).directory
    commands = [
        subprocess.Popen(
            [*COMMAND, str(directory), *AHEAD, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    printed = [command.communicate(timeout=DEADLINE_S) for command in commands]
    assert [command.returncode for command in commands] == [0, 0]
    first, second = (reused_in(out) for out, _ in printed)
    assert {*first} == {*second} == {"update/h1 8.9", "update/h64 8.9"}
    for name in first:
        assert {first[name], second[name]} == {True, False}
    assert len(PlanStore(Bundle.open(directory)).records()) == 2
