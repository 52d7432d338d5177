"""The parts of `scripts/prove production` with small counts, and without bounds on times."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.production.disk import disk_faults
from scripts.production.inputs import write_jobs
from scripts.production.kills import Inputs, killed_processes, killed_run, undisturbed_run
from scripts.production.memory import resident_memory
from scripts.production.throughput import (
    against_denoising,
    against_plain_loop,
    batch_gains,
    first_picture_s,
)


@pytest.fixture
def inputs(shared_bundle: Path, tmp_path: Path) -> Inputs:
    jobs = write_jobs(tmp_path / "jobs.jsonl", 24, ["b6", "b10"], prompts=10)
    return Inputs(shared_bundle, jobs, 24, ("--batch", 2, "--cache", tmp_path / "prompts"))


def test_killed_runs_end_with_every_job_done_once_and_the_same_bits(
    inputs: Inputs, tmp_path: Path
) -> None:
    undisturbed = undisturbed_run(inputs, tmp_path / "undisturbed")
    assert len(undisturbed.pictures) == 24
    found = killed_run(inputs, tmp_path / "killed", undisturbed, kills=3)
    assert found["faults"] == []
    assert (found["kills"], found["pictures"], found["rows"]) == (3, 24, 24)
    found = killed_processes(
        inputs, tmp_path / "processes", undisturbed, kills=3, processes=3, seed=1
    )
    assert found["faults"] == []
    assert (found["pictures"], found["rows"]) == (24, 24)


def test_runs_on_bad_disks_say_so_keep_their_log_and_go_on(
    shared_bundle: Path, tmp_path: Path
) -> None:
    mishaps = ["runs full", "becomes read-only"]
    found = disk_faults(shared_bundle, tmp_path, 12, mishaps)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["faults"] == []
    assert {name: row["rows"] for name, row in found["mishaps"].items()} == dict.fromkeys(
        mishaps, 12
    )


def test_a_run_makes_the_pictures_of_a_plain_loop(shared_bundle: Path, tmp_path: Path) -> None:
    found = against_plain_loop(shared_bundle, tmp_path, jobs=6, rounds=1)
    assert found["differing_pictures"] == 0
    assert set(found["seconds"]) == {"plain", "run"}


def test_what_a_run_is_measured_by_can_be_measured(shared_bundle: Path, tmp_path: Path) -> None:
    found = against_denoising(shared_bundle, tmp_path, "b10", jobs=4, rounds=1)
    assert str(found["batch"]) in found["picture_ms_by_batch"]
    assert set(batch_gains(shared_bundle, tmp_path, limit=2)["b6"]) == {"chosen", "1", "2"}
    assert all(first_picture_s(shared_bundle, tmp_path, rounds=1).values())


def test_memory_does_not_grow_with_the_jobs(shared_bundle: Path, tmp_path: Path) -> None:
    found = resident_memory(shared_bundle, tmp_path, jobs=100, settled=20, schedule="b6")
    assert found["samples"] > 10
    assert found["deviation"] < 0.15  # of so short a run; the proof asks for a third of it
