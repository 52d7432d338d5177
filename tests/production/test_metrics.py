from __future__ import annotations

import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from meancache_trt.errors import InputError
from meancache_trt.production.metrics import MetricsTarget
from meancache_trt.production.snapshot import Snapshot
from meancache_trt.production.watch import Sight
from tests.production.commands import call, ended, started, write_jobs

SIGHT = Sight(
    Snapshot(
        jobs=50, earlier=1, done=20, failed=2, others=3, elapsed_s=10.0,
        busy={"encode": 0.25, "denoise": 0.75}, waiting={"encode": 0, "denoise": 2},
    ),
    pictures_per_s=2.5,
    left_s=9.6,
)  # fmt: skip


def samples(text: str) -> dict[tuple[str, str], float]:
    """What a Prometheus would read: values by name, and by status or stage."""
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("9100", MetricsTarget(host="127.0.0.1", port=9100)),
        ("0", MetricsTarget(host="127.0.0.1", port=0)),
        ("0.0.0.0:9100", MetricsTarget(host="0.0.0.0", port=9100)),
        ("[::1]:9100", MetricsTarget(host="::1", port=9100)),
        ("out/night.prom", MetricsTarget(Path("out/night.prom"))),
    ],
)
def test_targets_are_endpoints_or_files(text, target):
    assert MetricsTarget.parse(text) == target


@pytest.mark.parametrize("text", ["", "here", "night.txt", "65536", ":9100", "-1", "a:b", "١٢"])
def test_other_targets_are_refused(text):
    with pytest.raises(InputError, match="metrics go to a port such as 9100"):
        MetricsTarget.parse(text)


def test_an_endpoint_tells_the_latest_sight():
    notes: list[str] = []
    with MetricsTarget.parse("0").view(notes.append) as show:
        (note,) = notes
        assert note.startswith("metrics at http://127.0.0.1:")
        url = note.removeprefix("metrics at ")
        assert "meancache" not in scraped(url)  # before there was anything to see
        show(SIGHT)
        found = samples(scraped(url))
    assert found == {
        ("meancache_jobs_total", "done"): 20,
        ("meancache_jobs_total", "failed"): 2,
        ("meancache_jobs_total", "others"): 3,
        ("meancache_jobs_total", "earlier"): 1,
        ("meancache_run_jobs", ""): 50,
        ("meancache_run_jobs_left", ""): 24,
        ("meancache_run_elapsed_seconds", ""): 10,
        ("meancache_run_left_seconds", ""): 9.6,
        ("meancache_pictures_per_second", ""): 2.5,
        ("meancache_stage_busy_ratio", "encode"): 0.25,
        ("meancache_stage_busy_ratio", "denoise"): 0.75,
        ("meancache_queue_items", "encode"): 0,
        ("meancache_queue_items", "denoise"): 2,
    }
    with pytest.raises(OSError, match="refused"):
        scraped(url)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        view = MetricsTarget(port=port).view(lambda _: None)
        with pytest.raises(InputError, match=f"cannot serve metrics at 127.0.0.1:{port}"), view:
            pass


def test_a_file_holds_the_last_sight(tmp_path):
    path = tmp_path / "night.prom"
    with MetricsTarget(path).view(lambda _: None) as show:
        show(Sight(Snapshot(jobs=50, earlier=0, done=0, failed=0, others=0, elapsed_s=0), 0, None))
        assert samples(path.read_text())["meancache_run_jobs_left", ""] == 50
        show(SIGHT)
    assert samples(path.read_text())["meancache_run_jobs_left", ""] == 24
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_refused_at_first_and_told_later(tmp_path):
    notes: list[str] = []
    path = tmp_path / "folder" / "night.prom"
    with (
        pytest.raises(InputError, match="a file in a directory that is there"),
        MetricsTarget(path).view(notes.append) as show,
    ):
        show(SIGHT)
    path.parent.mkdir()
    with MetricsTarget(path).view(notes.append) as show:
        show(SIGHT)
        path.unlink()
        path.parent.rmdir()
    (note,) = notes
    assert note.endswith("No such file or directory; rendering goes on")


def test_a_run_tells_its_metrics_while_it_goes_on_and_in_a_file(shared_bundle, tmp_path):
    jobs = [{"id": f"job{i}", "prompt": "large plain red circle left gray"} for i in range(40)]
    file = write_jobs(tmp_path / "jobs.jsonl", jobs)
    command = ("render", shared_bundle, "--prompts", file, "-o", tmp_path / "out")
    with started(*command, "--schedule", "full", "--batch", 1, "--metrics", 0) as process:
        url = process.stderr.readline().strip().removeprefix("metrics at ")
        found: dict[tuple[str, str], float] = {}
        while not found.get(("meancache_jobs_total", "done")):
            assert process.poll() is None
            found = samples(scraped(url))
        process.send_signal(signal.SIGTERM)
        assert ended(process).status == 0
    assert found["meancache_run_jobs", ""] == 40
    assert {stage for name, stage in found if name == "meancache_stage_busy_ratio"} == {
        *("encode", "denoise", "decode", "write")
    }
    text = tmp_path / "night.prom"
    other = (*command[:-1], tmp_path / "other", "--schedule", "b6")
    assert call(*other, "--metrics", text).status == 0
    found = samples(text.read_text())
    assert found["meancache_jobs_total", "done"] == 40
    assert found["meancache_run_jobs_left", ""] == 0


def test_a_run_does_not_begin_where_its_metrics_cannot_be_told(shared_bundle, tmp_path):
    file = write_jobs(tmp_path / "jobs.jsonl", [{"id": "a", "prompt": "a star"}])
    command = ("render", shared_bundle, "--prompts", file, "-o", tmp_path / "out")
    done = call(*command, "--schedule", "b6", "--metrics", tmp_path / "no" / "night.prom")
    assert done.status == 1
    assert "cannot write metrics to" in done.err
    assert list(tmp_path.glob("out/*.png")) == []
