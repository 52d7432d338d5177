from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from meancache_trt.bundle import Bundle
from meancache_trt.cli import main
from meancache_trt.meancache.schedule import Evidence, save_schedule

NODES, SPANS = "0,1,3,7,14,21,28,35,42,49", "1,2,1,1,1,1,1,1,4"
OFFICIAL_10 = (
    *("bake", "--method", "official", "--nodes", NODES, "--spans", SPANS),
    *("--steps", "50", "--shift", "3", "--json"),
)
PROMPT = "large plain red circle left gray"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; exit status, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def only_error(result: tuple[int, str, str]) -> str:
    """The message of a command that failed as it should: status 1, one line, nothing else."""
    status, out, err = result
    assert status == 1
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_bake_prints_the_folded_official_schedule(run):
    status, out, _ = run(*OFFICIAL_10)
    found = json.loads(out)
    assert status == 0
    assert list(found) == ["sigmas", "timesteps", "nodes", "weights"]
    assert len(found["sigmas"]) == 51
    assert len(found["timesteps"]) == 50
    assert found["nodes"] == [0, 1, 3, 7, 14, 21, 28, 35, 42, 49]
    sums = [sum(row) for row in found["weights"]]
    ends = np.diff([found["sigmas"][step] for step in [*found["nodes"], 50]])
    assert np.abs(np.array(sums) - ends).max() < 1e-12  # float64 sums of ten terms


def test_bake_prints_a_published_preset(run):
    status, out, _ = run("bake", "--preset", "Qwen/Qwen-Image:10", "--json")
    assert status == 0
    assert json.loads(out)["nodes"] == [0, 1, 3, 7, 14, 21, 28, 35, 42, 49]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nodes 0,1,3 --spans 1", "need 2 spans, found 1"),
        ("--nodes 0,3,1 --spans 1,1", "ascending order, found 1 after 3"),
        ("--nodes 1,3 --spans 1", "begins with 1"),
        ("--nodes 0,1,3 --spans 1,3", "1 to 2 .*, found 3"),
        ("--nodes 0,1,10 --spans 1,1", "0 to 9, found 10"),
        ("--nodes 0,1", "needs 1 spans"),
    ],
)
def test_bake_refuses_malformed_schedules_with_one_message(run, arguments, message):
    result = run("bake", "--method", "official", "--steps", 10, *arguments.split())
    assert re.search(message, only_error(result))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--budget 5 --target-psnr 35", "give --budget or --target-psnr, but not both"),
        ("--percentile 5", "--percentile and --confidence are those of --target-psnr"),
        ("--budget 5,x", "'5,x' is not a list of numbers such as 10 or 15,10"),
        ("--samples 1 --budget 5", "hold samples out and need at least 2"),
        ("--guidance-scale 6:2", "'6:2' is no range such as 2:6, the lower scale first"),
        ("--guidance-scale high", "'high' is no scale such as 3.5, and no range such as 2:6"),
    ],
)
@pytest.mark.parametrize("command", ["build", "calibrate"])
def test_goals_and_scales_that_cannot_be_meant_have_status_2(
    run, tmp_path, command, arguments, message
):
    status, out, err = run(command, "standin/flux", "-o", tmp_path / "x", *arguments.split())
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())
    assert not (tmp_path / "x").exists()


def test_a_goal_out_of_range_is_one_clear_error(run, tmp_path):
    goal = ("--target-psnr", 35, "--percentile", 100)
    message = only_error(run("build", "standin/flux", "-o", tmp_path / "x", *goal))
    assert "a percentile between 0 and 100" in message
    assert not (tmp_path / "x").exists()


def test_calibrate_finds_the_budget_of_a_goal_and_says_what_it_tried(run, tmp_path):
    goal = ("--target-psnr", 30, "--confidence", 0.9)
    sampled = ("--samples", 3, "--steps", 6, "--json")
    status, out, err = run("calibrate", "standin/flux", "-o", tmp_path / "c", *goal, *sampled)
    assert status == 0
    (found,) = json.loads(out)["schedules"]
    target = found["calibration"]["target"]
    assert (target["psnr"], target["percentile"]) == (30, None)
    assert target["confidence"] >= 0.9
    tried = [line for line in err.splitlines() if "evaluations: " in line]
    assert any(line.startswith(f"{found['budget']} evaluations") for line in tried)
    written = json.loads((tmp_path / "c" / f"b{found['budget']}.json").read_text())
    assert written["calibration"]["target"] == target


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--calibration somewhere --budget 5", "run the network; give its --bundle"),
        ("--nodes 0,1,3", "come from recordings; give --calibration"),
    ],
)
def test_fitted_weights_need_a_recording_and_its_network(run, arguments, message):
    status, out, err = run("bake", "--method", "fitted", *arguments.split())
    assert (status, out) == (2, "")
    assert message in err


def test_bake_needs_no_spans_where_there_is_no_edge(run):
    status, out, _ = run("bake", "--method", "official", "--nodes", 0, "--steps", 5, "--json")
    assert status == 0
    assert json.loads(out)["weights"] == [[-1.0]]


def test_a_preset_of_another_family_is_refused_by_a_bundle(run, bundle, tmp_path):
    assert run("bake", "--preset", "Qwen/Qwen-Image:10", "--bundle", bundle)[0] == 0
    result = run(
        "render", bundle, "--prompt", "a", "-o", tmp_path / "out", "--schedule", "Qwen-Image-b10"
    )
    assert "for the family 'qwen_image', this bundle is 'flux'" in only_error(result)


def test_long_histories_render(run, bundle, tmp_path):
    nodes = ",".join(map(str, range(0, 50, 2)))
    spans = ",".join(["1", *["3"] * 23])
    added = run(
        "bake", "--method", "official", "--nodes", nodes, "--spans", spans, "--steps", 50,
        "--shift", 3, "--bundle", bundle, "--name", "long",
    )  # fmt: skip
    assert added[0] == 0
    common = ("--prompt", PROMPT, "-o", tmp_path / "out", "--schedule", "long", "--json")
    status, out, err = run("render", bundle, *common)
    assert status == 0, err
    assert json.loads(out)["images"][0]["schedule"] == "long"


def test_bake_writes_a_file_that_inspect_reads(run, tmp_path):
    run(*OFFICIAL_10, "-o", tmp_path / "b10.json")
    status, out, _ = run("inspect", tmp_path / "b10.json")
    assert status == 0
    assert "official, 10 of 50 steps, shift 3, history 2" in out


def test_bake_adds_to_a_bundle(run, bundle):
    arguments = "bake --method ab2 --nodes 0,5,20 --steps 50 --shift 3 --name mine --bundle"
    assert run(*arguments.split(), bundle)[0] == 0
    status, out, _ = run("inspect", bundle, "--json")
    assert status == 0
    assert "mine" in [schedule["name"] for schedule in json.loads(out)["schedules"]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["bake"],
        ["bake", "--nodes", "0,x"],
        ["bake", "--nodes", "0", "--preset", "Qwen/Qwen-Image:10"],
        ["bake", "--preset", "Qwen/Qwen-Image:10", "--steps", "30"],
        ["bake", "--calibration", "x", "--budget", "6", "--guidance-scale", "9"],
        ["bake", "--nodes", "0", "--budget", "6"],
        ["render"],
        ["nonsense"],
    ],
)
def test_wrong_usage_has_status_2(run, arguments):
    status, _, err = run(*arguments)
    assert status == 2
    assert "Usage:" in err


def test_render_writes_a_picture_for_each_prompt(run, shared_bundle, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\nsmall plain blue star right pink\n")
    out_dir = tmp_path / "pictures"
    status, out, _ = run(
        "render", shared_bundle, "--prompts", tmp_path / "prompts.txt", "-o", out_dir,
        "--schedule", "b6", "--json",
    )  # fmt: skip
    assert status == 0
    assert json.loads(out)["schedules"] == {"b6": 2}
    paths = sorted(out_dir.glob("*.png"))
    assert [path.name for path in paths] == [
        "0000-large-plain-red-circle-left-gray.png",
        "0001-small-plain-blue-star-right-pink.png",
    ]
    with Image.open(paths[0]) as picture:
        assert picture.size == (64, 64)


def test_render_writes_each_format_and_inspect_tells_how_it_was_made(run, shared_bundle, tmp_path):
    status, out, _ = run(
        "render", shared_bundle, "--prompt", PROMPT, "-o", tmp_path, "--schedule", "b6",
        "--format", "jpeg:80", "--format", "latents", "--seed", 7, "--json",
    )  # fmt: skip
    assert status == 0
    (row,) = json.loads(out)["images"]
    assert [Path(path).suffix for path in row["files"]] == [".jpg", ".safetensors"]
    for path in row["files"]:
        facts = json.loads(run("inspect", path, "--json")[1])
        assert (facts["prompt"], facts["seed"], facts["schedule"]) == (PROMPT, "7", "b6")
    assert re.search(r"schedule +b6", run("inspect", row["path"])[1])


def test_rendering_twice_gives_the_same_bytes(run, shared_bundle, tmp_path):
    for name in ("a", "b"):
        run("render", shared_bundle, "--prompt", PROMPT, "-o", tmp_path / name, "--schedule", "6")
    (first,), (second,) = ((tmp_path / name).glob("*.png") for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_vae_tiling_is_passed_on_and_recorded(run, shared_bundle, tmp_path):
    common = ("render", shared_bundle, "--prompt", PROMPT, "--schedule", "b6", "-o", tmp_path)
    for flags, expected in (((), "False"), (("--vae-tiling",), "True")):
        assert run(*common, *flags)[0] == 0
        (path,) = tmp_path.glob("*.png")
        with Image.open(path) as picture:
            assert picture.info["vae_tiling"] == expected


def test_encoded_prompts_render_as_texts_do(run, shared_bundle, tmp_path):
    file = tmp_path / "prompts.safetensors"
    assert run("encode", shared_bundle, "--prompt", PROMPT, "-o", file)[0] == 0
    common = ("render", shared_bundle, "--schedule", "b6")
    run(*common, "--prompt", PROMPT, "-o", tmp_path / "a")
    run(*common, "--embeddings", file, "-o", tmp_path / "b")
    (first,), (second,) = ((tmp_path / name).glob("*.png") for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "absent.txt"], "expected a file at absent.txt, found nothing"),
        (["--prompt", "a", "--schedule", "absent.json"], "absent.json"),
        (["--prompt", "a", "--schedule", "b11"], "no schedule 'b11'"),
        (["--prompt", "a", "--height", "72"], "renders 64x64"),
        (["--prompt", "a", "--guidance-scale", "-1"], "guidance scale"),
        (["--prompt", "a", "--negative-prompt", "b"], "no classifier-free guidance"),
        (["--prompt", "a", "--seed", "-1"], "seed"),
        (["--prompt", "a", "--format", "mp4"], "an MP4 holds videos"),
    ],
)
def test_render_refuses_bad_input_and_leaves_no_directory(
    run, shared_bundle, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert message in only_error(run("render", shared_bundle, *arguments, "-o", "pictures"))
    assert not Path("pictures").exists()


def test_render_says_what_a_missing_bundle_needs(run, tmp_path):
    error = only_error(run("render", tmp_path / "no.mcb", "--prompt", "a", "-o", tmp_path / "out"))
    assert "meancache-trt build" in error


def test_an_output_path_that_is_a_file_is_refused(run, shared_bundle, tmp_path):
    (tmp_path / "out").write_text("mine")
    error = only_error(
        run("render", shared_bundle, "--prompt", "a", "-o", tmp_path / "out", "--schedule", "b6")
    )
    assert "cannot create" in error
    assert (tmp_path / "out").read_text() == "mine"


def test_plan_records_what_it_measured(run, bundle):
    status, out, _ = run("plan", bundle, "--threads", 1, "--json")
    assert status == 0
    (planned,) = json.loads(out)["bundles"]
    record = planned["measured"]
    assert record["runtime"] == "onnxruntime-cpu"
    assert record["evaluation_ms"] > 0
    listed = json.loads(run("inspect", bundle, "--json")[1])
    assert listed["measured"] == [record]
    assert planned["plans"] == listed["plans"] == []


def test_inspect_tells_what_a_bundle_holds(run, shared_bundle):
    status, out, _ = run("inspect", shared_bundle, "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["family"] == "flux"
    assert {"transformer", "prepare", "vae_decoder", "update/h4"} <= set(facts["components"])
    assert all(record["max_abs_error"] <= record["tolerance"] for record in facts["parity"])
    assert [schedule["budget"] for schedule in facts["schedules"]] == [50, 10, 6]
    status, out, _ = run("inspect", shared_bundle)
    assert status == 0
    assert "transformer" in out


def test_inspect_tells_the_precision_of_what_was_calibrated(run, bundle, tmp_path):
    opened = Bundle.open(bundle)
    plain = opened.schedule("b6")
    measured = msgspec.structs.replace(
        plain, name="mine", precision="bfloat16", calibration=Evidence(samples=1, seconds=0.0)
    )
    opened.add_schedule(measured)
    facts = json.loads(run("inspect", bundle, "--json")[1])
    found = {schedule["name"]: schedule["precision"] for schedule in facts["schedules"]}
    assert (found["mine"], found["b6"]) == ("bfloat16", None)
    (row,) = (line for line in run("inspect", bundle)[1].splitlines() if line.startswith("mine"))
    assert "bfloat16" in row
    save_schedule(measured, tmp_path / "mine.json")
    assert "calibrated in bfloat16" in run("inspect", tmp_path / "mine.json")[1]


def test_doctor_reports_packages_and_backends(run):
    status, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["packages"]["onnxruntime"]
    assert any(backend["is_available"] for backend in facts["backends"])
    assert run("doctor")[0] == 0


def test_help_needs_no_heavy_package():
    script = (
        "import sys; from meancache_trt.cli import cli; "
        "bad = {'torch', 'diffusers', 'onnxruntime', 'tensorrt', 'onnx', 'fastapi', 'pydantic', "
        "'prometheus_client', 'ray', 'uvicorn'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "found 16 of 0"),
        (["--budget", 51], "1 to 50 evaluations"),
        (["--height", 70], "use 64 or 72"),
        (["--prompts", "absent.txt"], "absent.txt"),
    ],
)
def test_build_refuses_bad_input_before_it_works(run, tmp_path, arguments, message):
    output = tmp_path / "new.mcb"
    assert message in only_error(run("build", "standin/flux", "-o", output, *arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere", "neither a folder nor a hub id"),
        ("standin/none", r"one of ['flux', 'hunyuan_video', 'qwen_image']"),
        (".", "model_index.json"),
    ],
)
def test_build_names_what_is_no_model(run, tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    assert message in only_error(run("build", model, "-o", "new.mcb"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_build_does_everything_and_skips_what_is_done(run, tmp_path):
    output = tmp_path / "flux.mcb"
    arguments = ("build", "standin/flux", "-o", output, "--samples", 2, "--budget", 8, "--json")
    status, out, err = run(*arguments)
    assert status == 0, err
    assert {row["name"] for row in json.loads(out)["schedules"]} == {"full", "b8"}
    status, _, err = run(*arguments)
    assert status == 0
    assert "already there" in err
    status, out, err = run(*arguments, "--height", 32, "--width", 32)
    assert status == 0, err
    assert "added 32x32" in err
    assert {row["name"] for row in json.loads(out)["schedules"]} == {"full", "b8", "b8-32x32"}
    error = run("build", "standin/flux", "-o", output, "--text-tokens", 16)
    assert error[0] == 1
    assert "32 text tokens against 16" in error[2]
