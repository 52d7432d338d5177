from __future__ import annotations

import dataclasses
import json
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from meancache_trt.cli.batch import Batching
from meancache_trt.cli.signals import stopping
from meancache_trt.media.metadata import read_metadata
from tests.production.commands import (
    call,
    digests,
    ended,
    rows,
    started,
    wait_for_rows,
    write_jobs,
)

CIRCLE, STAR = "large plain red circle left gray", "small plain blue star right pink"
SIX = [{"id": f"job{i}", "prompt": (CIRCLE, STAR)[i % 2], "seed": i} for i in range(6)]
ENDLESS = [{"id": f"job{i}", "prompt": CIRCLE, "seed": i, "schedule": "full"} for i in range(8)]
NO_TIME = ("--timeout", 1e-6)  # which no loop can keep: every job fails
TOO_LONG = "\N{GRINNING FACE}" * 6000  # 12 bytes each in EXIF, which holds 65533


@pytest.fixture
def render(shared_bundle: Path, tmp_path: Path):
    """Render a list of jobs, into `out` of the test's directory unless told otherwise."""

    def run(jobs, *options, out="out"):
        file = write_jobs(tmp_path / "jobs.jsonl", jobs)
        return call("render", shared_bundle, "--prompts", file, "-o", tmp_path / out, *options)

    return run


def test_jobs_become_files_of_their_ids_in_every_format(render, tmp_path):
    done = render(
        SIX[:3], "--schedule", "b6", "--format", "png", "--format", "jpeg:80", "--format", "latents"
    )
    assert done.status == 0
    names = {f"job{i}{suffix}" for i in range(3) for suffix in (".png", ".jpg", ".safetensors")}
    assert set(digests(tmp_path / "out")) == names
    assert {row["id"]: row["status"] for row in rows(tmp_path / "out")} == dict.fromkeys(
        ("job0", "job1", "job2"), "done"
    )
    assert re.search(r"^done +3$", done.out, re.MULTILINE)
    assert "results: " in done.err


def test_what_a_job_says_comes_before_the_options(render, tmp_path):
    jobs = [
        {"id": "own", "prompt": CIRCLE, "seed": 5, "schedule": 6, "guidance_scale": 2.0},
        {"id": "bare", "prompt": CIRCLE},
    ]
    assert render(jobs, "--schedule", "b10", "--seed", 9, "--guidance-scale", 4).status == 0
    own, bare = (read_metadata(tmp_path / "out" / f"{name}.png") for name in ("own", "bare"))
    assert (own["seed"], own["schedule"], own["guidance_scale"]) == ("5", "b6", "2.0")
    assert (bare["seed"], bare["schedule"], bare["guidance_scale"]) == ("9", "b10", "4.0")


def test_a_run_makes_the_pictures_of_single_prompts(render, shared_bundle, tmp_path):
    assert render([{"id": "a", "prompt": STAR, "seed": 3}], "--schedule", "b6").status == 0
    single = ("--prompt", STAR, "--seed", 3, "--schedule", "b6", "-o", tmp_path / "single")
    assert call("render", shared_bundle, *single).status == 0
    (path,) = (tmp_path / "single").glob("*.png")
    with Image.open(path) as expected, Image.open(tmp_path / "out" / "a.png") as found:
        assert found.tobytes() == expected.tobytes()


def test_names_follow_the_template(render, tmp_path):
    done = render(SIX[:2], "--schedule", "b6", "--name", "{schedule}/{index:03d}-{seed}-{slug:.5}")
    assert done.status == 0
    assert set(digests(tmp_path / "out")) == {"b6/000-0-large.png", "b6/001-1-small.png"}


def test_bad_lines_are_told_by_number_before_anything_is_rendered(render, tmp_path):
    jobs = [SIX[0], {"id": "../x", "prompt": STAR}, {"id": "y", "prompt": STAR, "schedule": "b11"}]
    done = render(jobs, "--schedule", "b6")
    assert (done.status, done.out) == (1, "")
    assert "2 of 3 jobs cannot be rendered; nothing was" in done.err
    assert re.search(r"line 2: an id is .*\n +line 3: .* no schedule 'b11'", done.err)
    assert not (tmp_path / "out").exists()


def test_bad_lines_are_skipped_on_request_and_counted(render, tmp_path):
    bad = [{"id": f"bad{i}", "prompt": ""} for i in range(23)]
    done = render([SIX[0], *bad], "--schedule", "b6", "--skip-bad", "--json")
    assert done.status == 0
    assert done.facts["bad_lines"] == 23
    assert done.facts["first_bad_lines"][0]["line"] == 2
    assert set(digests(tmp_path / "out")) == {"job0.png"}
    told = [line for line in done.err.splitlines() if line.startswith("skipped")]
    assert told[0].startswith("skipped line 2: prompt is empty")
    assert told[20:] == ["skipped 3 more lines"]


def test_a_target_holds_for_jobs_that_choose_no_schedule(render):
    jobs = [{"id": "aimed", "prompt": CIRCLE}, {"id": "chosen", "prompt": CIRCLE, "schedule": "b6"}]
    done = render(jobs, "--target-psnr", 30, "--skip-bad", "--json")
    assert done.facts["done"] == 1
    (bad,) = done.facts["first_bad_lines"]
    assert "no schedule of the bundle is known to keep 30 dB" in bad["fault"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompt a --batch 2 --skip-bad", "takes --batch, --skip-bad; give --prompts FILE"),
        ("--prompt a --max-failures 0", "takes --max-failures; give --prompts FILE"),
        ("--prompts a.txt --batch 2 --max-batch 4", "--batch or --max-batch, but not both"),
        ("--prompts a.txt --percentile 5", "--percentile is that of --target-psnr"),
        ("--prompts a.txt --target-psnr 30 --schedule 6", "--schedule or --target-psnr"),
        ("--prompts a.txt --prompt b", "and only one"),
        ("--prompts a.txt --name {it}", "a name template has the fields id, index"),
        ("--prompts a.txt --format gif", "a format of png, jpeg"),
        ("--prompts a.txt --memory-cap much", "'much' is no size"),
        ("--prompts a.txt --metrics here", "metrics go to a port"),
    ],
)
def test_options_that_cannot_be_meant_have_status_2(tmp_path, arguments, message):
    done = call("render", "no.mcb", "-o", tmp_path / "out", *arguments.split())
    assert (done.status, done.out) == (2, "")
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--min-free 1000T", "free, less than the"),
        ("--memory-cap 1", "of memory, the cap is 1 MiB"),
        ("--format mp4", "an MP4 holds videos"),
        ("--format png --format png", "each once"),
    ],
)
def test_limits_and_formats_are_checked_before_the_first_picture(
    render, tmp_path, arguments, message
):
    done = render(SIX, "--schedule", "b6", *arguments.split())
    assert done.status == 1
    assert message in done.err
    assert rows(tmp_path / "out") == []


def test_a_job_that_fails_is_told_and_the_others_are_done(render, tmp_path):
    jobs = [SIX[0], {"id": "long", "prompt": TOO_LONG}, SIX[1]]
    done = render(jobs, "--schedule", "b6", "--format", "jpeg", "--json")
    assert done.status == 1
    assert f"error: 1 of 3 jobs failed; {tmp_path / 'out' / 'results.jsonl'} says why" in done.err
    (failure,) = done.facts["failures"]
    assert failure["id"] == "long"
    assert failure["error"].startswith("EXIF holds 65533 bytes")
    assert set(digests(tmp_path / "out")) == {"job0.jpg", "job1.jpg"}


def test_failed_jobs_are_tried_again_on_request_alone(render, tmp_path):
    first = render(SIX, "--schedule", "b6", *NO_TIME)
    assert first.status == 1
    assert "6 of 6 jobs failed" in first.err
    # Five of them are told, in the order in which they failed.
    assert re.search(r"failed job\d: the loop took longer than 1e-06 s", first.out)
    again = render(SIX, "--schedule", "b6", "--json")
    assert (again.status, again.facts["earlier"], again.facts["done"]) == (1, 6, 0)
    assert digests(tmp_path / "out") == {}
    retried = render(SIX, "--schedule", "b6", "--retry-failed", "--json")
    assert (retried.status, retried.facts["here"], retried.facts["failed"]) == (0, 6, 0)
    assert len(digests(tmp_path / "out")) == 6


def test_too_many_failures_end_a_run(render, tmp_path):
    many = [{"id": f"job{i}", "prompt": CIRCLE, "seed": i} for i in range(40)]
    one_by_one = ("--schedule", "b6", "--batch", 1, "--workers", 1, *NO_TIME)
    for again in ((), ("--retry-failed",)):
        done = render(many, *one_by_one, "--max-failures", 1, *again, "--json")
        assert done.status == 1
        assert "2 jobs have failed, 1 are allowed" in done.err
        assert 0 < done.facts["failed"] < 40
    assert digests(tmp_path / "out") == {}


def test_another_version_of_the_runtime_is_refused_unless_any_may_be(render, tmp_path):
    assert render(SIX[:1], "--schedule", "b6").status == 0
    path = tmp_path / "out" / ".meancache" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runtime_version": "0.1"}))
    refused = render(SIX[:2], "--schedule", "b6")
    assert refused.status == 1
    assert "begun with runtime_version '0.1'" in refused.err
    assert render(SIX[:2], "--schedule", "b6", "--any-version").status == 0


@pytest.mark.parametrize(
    ("workers", "threads", "expected"),
    [(None, 0, (8, 1)), (None, 3, (2, 3)), (None, 20, (1, 20)), (2, 0, (2, 4)), (20, 0, (20, 1))],
)
def test_workers_and_threads_share_the_cores_of_the_process(
    monkeypatch, workers, threads, expected
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    given = dict.fromkeys(field.name for field in dataclasses.fields(Batching))
    assert Batching(**{**given, "workers": workers}).cores(threads) == expected


def test_a_read_only_target_ends_cleanly_and_resumes(on_small_disk, shared_bundle, tmp_path):
    file = write_jobs(tmp_path / "jobs.jsonl", SIX[:2])
    told = on_small_disk(f"""
        from tests.production.commands import call

        arguments = ("render", {str(shared_bundle)!r}, "--prompts", {str(file)!r})
        make_read_only()
        done = call(*arguments, "-o", disk / "out", "--schedule", "b6")
        print(done.status, done.err)
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        print(call(*arguments, "-o", disk / "out", "--schedule", "b6", "--min-free", "8K").status)
    """)
    *refused, resumed = told.strip().splitlines()
    assert " ".join(refused).startswith("1 error: cannot create ")
    assert resumed == "0"


@pytest.fixture(scope="module")
def undisturbed(shared_bundle: Path, tmp_path_factory) -> dict[str, str]:
    """What `ENDLESS` gives in a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file = write_jobs(folder / "jobs.jsonl", ENDLESS)
    done = call("render", shared_bundle, "--prompts", file, "-o", folder / "out", "--batch", 4)
    assert done.status == 0
    return digests(folder / "out")


def of_own(bundle: Path, folder: Path, jobs=ENDLESS, batch: int = 1) -> tuple[object, ...]:
    """A command that renders jobs as slowly as it can."""
    file = write_jobs(folder / "jobs.jsonl", jobs)
    slowly = ("--batch", batch, "--workers", 1, "--threads", 1)
    return ("render", bundle, "--prompts", file, "-o", folder / "out", *slowly, "--json")


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGTERM, 0, "run the same command to go on"),
        (signal.SIGINT, 130, "run the same command to go on"),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_a_run_that_was_ended_goes_on_where_it_was(
    shared_bundle, tmp_path, undisturbed, number, status, message
):
    command = of_own(shared_bundle, tmp_path)
    with started(*command) as process:
        wait_for_rows(tmp_path / "out", 1)
        process.send_signal(number)
        stopped = ended(process)
    assert stopped.status == status
    assert message in stopped.err
    before = rows(tmp_path / "out")
    assert 1 <= len(before) < len(ENDLESS)
    resumed = call(*command)
    assert (resumed.status, resumed.facts["earlier"]) == (0, len(before))
    assert sorted(row["id"] for row in rows(tmp_path / "out")) == [job["id"] for job in ENDLESS]
    assert digests(tmp_path / "out") == undisturbed


def test_a_second_interrupt_ends_a_run_at_once(shared_bundle, tmp_path, undisturbed):
    quick = {"id": "quick", "prompt": CIRCLE, "schedule": "b6"}
    command = of_own(shared_bundle, tmp_path, [quick, *ENDLESS], batch=len(ENDLESS))
    with started(*command) as process:
        wait_for_rows(tmp_path / "out", 1)  # the batch of all the others has begun
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again ends at once" in process.stderr.readline()
        while process.poll() is None:  # one within half a second counts as the same
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        found = ended(process)
    assert (found.status, found.out) == (130, "")
    assert [row["id"] for row in rows(tmp_path / "out")] == ["quick"]
    assert call(*command).status == 0
    found = digests(tmp_path / "out")
    assert {name: found[name] for name in undisturbed} == undisturbed
    assert found.keys() - undisturbed.keys() == {"quick.png"}


def test_processes_share_a_directory(shared_bundle, tmp_path, undisturbed):
    command = of_own(shared_bundle, tmp_path)
    with started(*command) as first, started(*command) as second:
        both = ended(first), ended(second)
    assert [done.status for done in both] == [0, 0]
    assert sum(done.facts["here"] for done in both) == len(ENDLESS)
    assert sorted(row["id"] for row in rows(tmp_path / "out")) == [job["id"] for job in ENDLESS]
    assert digests(tmp_path / "out") == undisturbed


def test_signals_are_handled_as_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop, told = threading.Event(), []
    with stopping(stop, told.append) as caught:
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(60)
        signal.raise_signal(signal.SIGTERM)
    assert caught.signal == signal.SIGTERM
    assert len(told) == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_inspect_sums_a_run_up(render, tmp_path):
    jobs = [*SIX[:2], {"id": "long", "prompt": TOO_LONG, "schedule": "b10"}]
    render(jobs, "--schedule", "b6", "--format", "jpeg")
    log = tmp_path / "out" / "results.jsonl"
    for path in (tmp_path / "out", log):
        facts = call("inspect", path, "--json").facts
        assert (facts["done"], facts["failed"], facts["schedules"]) == (2, 1, {"b6": 2})
        assert [failure["id"] for failure in facts["failures"]] == ["long"]
        assert facts["first_finished_at"] <= facts["last_finished_at"]
        (warning,) = facts["warnings"]
        assert "no calibration" in warning
    told = call("inspect", log).out
    assert "2 done, 1 failed" in told
    log.write_bytes(log.read_bytes() + b'{"id": "torn')
    assert call("inspect", log, "--json").facts == facts
    log.write_text("{}\n")
    assert "line 1 of" in call("inspect", log).err
