"""`meancache-trt evaluate`, as users run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from meancache_trt import standins
from meancache_trt.bundle import Bundle
from meancache_trt.cli import main
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.record import Recorder, RecordOptions
from tests.test_cli import only_error

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def finished(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated")
    arguments = [
        *("evaluate", str(shared_bundle), "--schedules", "b6,b10", "--samples", "2"),
        *("--threads", "1", "--batch", "2", "-o", str(output), "--pictures"),
    ]
    main(arguments)
    return output


def test_a_bundles_schedules_are_evaluated(finished: Path) -> None:
    found = json.loads((finished / "evaluation.json").read_text())
    assert [row["budget"] for row in found["rows"]] == [6, 10]
    assert [p["text"] for p in found["prompts"]] == standins.prompts("evaluation")[:2]
    assert [p["seed"] for p in found["prompts"]] == [1000, 1001]
    assert found["setup"]["batch"] == 2
    assert "<svg" in (finished / "report.html").read_text()
    assert len(list((finished / "pictures").rglob("*.png"))) == 3 * 2


def test_a_finished_evaluation_is_reported_again_without_rendering(
    run: Run, finished: Path, tmp_path: Path
) -> None:
    status, out, err = run("evaluate", finished, "-o", tmp_path / "again")
    assert status == 0, err
    assert "against the model's own 50 steps" in out
    assert "PSNR above official" in out
    assert "<img" in (tmp_path / "again" / "report.html").read_text()
    assert not (tmp_path / "again" / "rows").exists()


def test_json_is_the_file_on_standard_output(run: Run, finished: Path) -> None:
    status, out, _ = run("evaluate", finished / "evaluation.json", "--json")
    assert status == 0
    assert json.loads(out) == json.loads((finished / "evaluation.json").read_text())


def test_methods_are_baked_from_the_recordings_beside_the_bundle(
    run: Run, bundle: Path, tmp_path: Path
) -> None:
    _record(bundle)
    status, out, err = run(
        "evaluate", bundle, "--methods", "euler,euler-own-grid", "--budgets", "3,2",
        "--samples", 2, "--reference-steps", 8, "--threads", 1, "--against", "euler-own-grid",
        "-o", tmp_path / "report", "--json",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(out)
    rows = [(row["method"], row["budget"]) for row in found["rows"]]
    assert rows == [("euler", 2), ("euler", 3), ("euler-own-grid", 2), ("euler-own-grid", 3)]
    assert found["setup"]["steps"] == 6
    assert found["rows"][0]["fine"]["psnr"]["difference"] is not None
    assert found["edge_costs"]["samples"] == 2
    names = sorted(
        path.name.partition(".")[0] for path in (tmp_path / "report/schedules").iterdir()
    )
    assert names == ["euler-b2", "euler-b3", "euler-own-grid-b2", "euler-own-grid-b3"]


def _record(bundle: Path) -> None:
    options = RecordOptions(
        size=(64, 64), prompts=tuple(standins.prompts("calibration")), steps=6, samples=2
    )
    directory = bundle.with_name(f"{bundle.name}.calibration")
    recorder = Recorder(Checkpoint(standins.path("flux")), options)
    recorder.record(directory, note=lambda _: None, report=lambda *_: None)


def test_a_pipeline_is_recorded_first_and_needs_no_bundle(run: Run, tmp_path: Path) -> None:
    status, out, err = run(
        "evaluate", "standin/flux", "--methods", "euler,fitted", "--budgets", "2", "--steps", 4,
        "--calibration-samples", 4, "--samples", 2, "--threads", 1, "-o", tmp_path,
    )  # fmt: skip
    assert status == 0, err
    assert "PSNR above fitted" in out
    assert (tmp_path / "calibration" / "trajectories.json").exists()
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--methods", "euler"], "expected some in"),
        (["--schedules", "b6", "--methods", "euler"], "give --schedules, or --methods"),
        (["--schedules", "b11"], "no schedule 'b11'"),
        (["--schedules", "absent.json"], "absent.json"),
        ([], "no schedule that is calibrated for 64x64"),
        (["--schedules", "b6", "--against", "fitted"], "one of the evaluated methods, official"),
        (["--schedules", "b6", "--reference-steps", 50], "more steps than the model's own 50"),
        (["--schedules", "b6", "--height", 72], "renders 64x64"),
        (["--schedules", "b6", "--prompts", "absent.txt"], "expected a file at absent.txt"),
        (["--schedules", "b6", "--calibration", "absent"], "trajectories.json"),
    ],
)
def test_bad_input_is_one_clear_error(
    run: Run,
    shared_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    error = only_error(run("evaluate", shared_bundle, *arguments, "--samples", 1))
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "20"], "--steps does not apply to a bundle"),
        (["--schedules", "b6", "--pictures"], "--pictures are kept in --output"),
        (["--budgets", "6,x"], "is not a list of numbers"),
        (["--methods", "euler,,ab2"], "is not a list of names"),
    ],
)
def test_wrong_usage_of_a_bundle(
    run: Run, shared_bundle: Path, arguments: list[str], message: str
) -> None:
    status, _, err = run("evaluate", shared_bundle, *arguments)
    assert status == 2
    assert message in err


def test_wrong_usage_of_a_pipeline_and_of_a_finished_evaluation(run: Run, finished: Path) -> None:
    status, _, err = run("evaluate", "standin/flux", "--batch", 2)
    assert status == 2
    assert "--batch does not apply to a diffusers pipeline" in err
    status, _, err = run("evaluate", finished, "--samples", 2)
    assert status == 2
    assert "--samples does not apply to a finished evaluation" in err


def test_what_is_neither_bundle_nor_model_is_named(run: Run, tmp_path: Path) -> None:
    assert "neither a folder nor a hub id" in only_error(run("evaluate", "/nowhere"))
    (tmp_path / "evaluation.json").write_text("{}")
    assert "not a valid evaluation file" in only_error(run("evaluate", tmp_path))


def test_prompts_that_were_calibrated_on_are_refused(
    run: Run, bundle: Path, tmp_path: Path
) -> None:
    _record(bundle)
    (tmp_path / "prompts.txt").write_text(standins.prompts("calibration")[1] + "\n")
    opened = Bundle.open(bundle)
    error = only_error(
        run(
            *("evaluate", bundle, "--schedules", opened.schedule_names()[-1]),
            *("--prompts", tmp_path / "prompts.txt", "--seed", 1),
        )
    )
    assert "expected prompts that were not calibrated on" in error
