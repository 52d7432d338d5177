"""Runs on Ray: the same pictures as here, each job once, whoever is killed.

Each run is in a process of its own, because Ray warns of itself, and warnings are errors here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from meancache_trt.errors import InputError, RuntimeUnavailableError
from meancache_trt.media.formats import OutputFormat
from meancache_trt.production.chunks import Chunk, chunks_of
from meancache_trt.production.claims import FOLDER
from meancache_trt.production.job_files import read_jobs
from meancache_trt.production.jobs import Limits
from meancache_trt.production.limits import Guard
from meancache_trt.production.names import NameTemplate
from meancache_trt.production.ray_cluster import Cluster, actor_pool, joined_cluster
from meancache_trt.production.ray_data import Opening, RayRun, shared_out
from meancache_trt.production.results import LOG
from meancache_trt.production.run import Run, RunOptions
from meancache_trt.production.snapshot import Snapshot
from meancache_trt.production.tickets import Checker, Defaults, Settings, check_all
from meancache_trt.render import load
from tests.production.made import make_ticket

ROOT = Path(__file__).parents[2]
JOBS = 32
SEED = 4
"""One whose first kill is amid the run: see `moments_of`."""

_PRELUDE = """
import json, signal, sys, threading
from pathlib import Path
import psutil
from scripts.production.ray_kills import ray_run, ray_with_kills

bundle, jobs, output = map(Path, sys.argv[1:])
"""


def options_in(output: Path) -> RunOptions:
    return RunOptions(
        output, (OutputFormat("png"),), NameTemplate.parse("{id}"), Guard(output, 0), workers=1
    )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "jobs.jsonl"
    schedules = ["b6", "b10"] * (JOBS // 4) + ["full"] * (JOBS // 2)  # the end takes its time
    prompts = ["a red circle", "a blue circle", "a green square"] * JOBS
    lines = [
        {"id": f"j{index}", "prompt": prompts[index], "seed": index, "schedule": schedule}
        for index, schedule in enumerate(schedules)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run_here(bundle: Path, jobs: Path, output: Path) -> Snapshot:
    with load(bundle, backend="onnxruntime", threads=1, embedding_cache="off") as pipeline:
        checker = Checker(pipeline, Settings(), Defaults(), Limits())
        tickets, _ = check_all(read_jobs(jobs), checker, skip_bad=False)
        return Run(pipeline, tickets, Settings(), options_in(output)).run(threading.Event())


@pytest.fixture(scope="module")
def plain(
    shared_bundle: Path, jobs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of an undisturbed run in this process."""
    output = tmp_path_factory.mktemp("plain")
    run_here(shared_bundle, jobs, output)
    files = files_in(output)
    assert len(files) == JOBS
    return files


def files_in(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.suffix == ".png"}


def rows_in(output: Path) -> list[dict[str, Any]]:
    log = output / LOG
    return [json.loads(line) for line in log.read_bytes().splitlines()] if log.exists() else []


def assert_done_once(output: Path, plain: dict[str, bytes]) -> None:
    rows = rows_in(output)
    assert sorted(row["id"] for row in rows) == sorted(f"j{index}" for index in range(JOBS))
    assert {row["status"] for row in rows} == {"done"}
    assert files_in(output) == plain
    assert not list((output / FOLDER).glob("tmp-*"))


def started(script: str, bundle: Path, jobs: Path, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(script), bundle, jobs, output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def end(family: list[psutil.Process]) -> None:
    """Wait for what goes with its driver; Ray's agents end a minute later, so help them."""
    agents = [process for process in family if process.is_running() and "Agent" in process.name()]
    others = [process for process in family if process not in agents]
    assert not psutil.wait_procs(others, timeout=60)[1]
    for agent in agents:
        agent.kill()
    assert not psutil.wait_procs(agents, timeout=60)[1]


def finished(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(next(line for line in out.splitlines() if line.startswith("[")))


@pytest.mark.slow
def test_killed_actors_are_replaced_and_a_second_run_finds_nothing_to_do(
    shared_bundle: Path, jobs: Path, tmp_path: Path, plain: dict[str, bytes]
) -> None:
    script = """
        import ray
        ray.init("local", include_dashboard=False, log_to_driver=False)
        first = ray_with_kills(bundle, jobs, output, kills=2, seed=SEED)
        log = (output / "results.jsonl").read_bytes()
        again = ray_with_kills(bundle, jobs, output, kills=0)
        is_same = log == (output / "results.jsonl").read_bytes()
        print(json.dumps([first, again, is_same, ray.is_initialized()]))
    """.replace("SEED", str(SEED))
    first, again, is_same, is_ray_left = finished(started(script, shared_bundle, jobs, tmp_path))
    assert first["kills"] == 2
    assert (first["earlier"], first["done"]) == (0, JOBS)
    assert (again["earlier"], again["done"]) == (JOBS, 0)
    assert is_same
    assert is_ray_left  # it was there before
    assert_done_once(tmp_path, plain)


@pytest.mark.slow
def test_two_actors_render_what_one_process_does_and_nothing_stays(
    shared_bundle: Path, jobs: Path, tmp_path: Path, plain: dict[str, bytes]
) -> None:
    script = """
        handler = lambda *_: None
        signal.signal(signal.SIGTERM, handler)
        run = ray_run(bundle, jobs, output, actors=2)
        snapshot = run.run(threading.Event())
        left = [process.name() for process in psutil.Process().children(recursive=True)]
        is_handler_kept = signal.getsignal(signal.SIGTERM) is handler
        print(json.dumps([snapshot.done, snapshot.left, left, is_handler_kept]))
    """
    found = finished(started(script, shared_bundle, jobs, tmp_path))
    assert found == [JOBS, 0, [], True]
    assert_done_once(tmp_path, plain)


@pytest.mark.slow
def test_what_an_actor_raises_comes_back_as_our_error(
    shared_bundle: Path, jobs: Path, tmp_path: Path
) -> None:
    script = """
        from meancache_trt.errors import InputError
        try:
            ray_run(bundle, jobs, output, actors=1, min_free_bytes=1 << 60).run(threading.Event())
        except InputError as error:
            left = psutil.Process().children(recursive=True)
            print(json.dumps([str(error), len(left)]))
    """
    message, left = finished(started(script, shared_bundle, jobs, tmp_path))
    assert f"{tmp_path} has" in message
    assert "make room" in message
    assert left == 0
    assert not rows_in(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("signal_sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_whose_driver_is_stopped_or_killed_is_gone_on_with(
    signal_sent: signal.Signals,
    shared_bundle: Path,
    jobs: Path,
    tmp_path: Path,
    plain: dict[str, bytes],
) -> None:
    script = """
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        snapshot = ray_run(bundle, jobs, output, actors=1).run(stop)
        print(json.dumps([snapshot.done, snapshot.left, snapshot.is_stopped]))
    """
    process = started(script, shared_bundle, jobs, tmp_path)
    while not rows_in(tmp_path):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal_sent)
    if signal_sent == signal.SIGTERM:
        done, left, is_stopped = finished(process)
        assert done == len(rows_in(tmp_path)) > 0
        assert done + left == JOBS
        assert left > 0
        assert is_stopped
        assert not list((tmp_path / FOLDER).glob("tmp-*"))
        assert not psutil.wait_procs(family, timeout=60)[1]
    else:
        process.communicate()
        end(family)
    files = files_in(tmp_path)
    assert all(files[f"{row['id']}.png"] == plain[f"{row['id']}.png"] for row in rows_in(tmp_path))
    run_here(shared_bundle, jobs, tmp_path)
    assert_done_once(tmp_path, plain)


def test_every_chunk_is_in_one_share_and_shares_are_even() -> None:
    chunks = chunks_of([make_ticket(index) for index in range(11)], lambda _: 1, lambda _: 1)
    for count in (1, 2, 3, 11, 12, 40):
        shares = shared_out(chunks, count)
        assert len(shares) == count
        assert list(joined(shares)) == chunks
        sizes = {len(share) for share in shares}
        assert max(sizes) - min(sizes) <= 1


def joined(shares: Sequence[list[Chunk]]) -> Iterator[Chunk]:
    return (chunk for share in shares for chunk in share)


def node(cores: float, gpus: float = 0, *, is_alive: bool = True) -> dict[str, Any]:
    return {"Alive": is_alive, "Resources": {"CPU": cores, "GPU": gpus}}


def test_there_is_an_actor_for_each_gpu() -> None:
    pool = actor_pool([node(8, 2), node(4), node(8, 4, is_alive=False)], Cluster(), 0, 1)
    assert (pool.actors, pool.resources, pool.threads) == (2, {"num_gpus": 1}, 0)
    assert actor_pool([node(8, 2)], Cluster(actors=1), 0, 1).actors == 1


@pytest.mark.parametrize(
    ("threads", "workers", "asked", "actors", "cores", "used"),
    [
        (1, 1, None, 10, 1, 1),
        (2, 1, None, 5, 2, 2),
        (3, 1, None, 3, 3, 3),  # two on 8 cores, none on 2, one on what is left of 4
        (1, 4, None, 2, 4, 1),
        (0, 1, None, 5, 2, 2),  # all cores of the smallest node
        (0, 2, None, 5, 2, 1),
        (0, 1, 4, 4, 1, 1),
        (1, 1, 3, 3, 1, 1),
    ],
)
def test_without_gpus_there_are_as_many_actors_as_cores_suffice_for(
    threads: int, workers: int, asked: int | None, actors: int, cores: int, used: int
) -> None:
    nodes = [node(8), node(2)]
    if (threads, workers) == (3, 1):
        nodes = [node(8), node(2), node(4)]
    pool = actor_pool(nodes, Cluster(actors=asked), threads, workers)
    assert (pool.actors, pool.resources, pool.threads) == (actors, {"num_cpus": cores}, used)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([], "no cores and no GPUs"),
        ([node(0)], "no cores and no GPUs"),
        ([node(2)], "needs 3 cores, the largest node of the Ray cluster has 2"),
    ],
)
def test_a_cluster_without_room_for_an_actor_is_refused(
    nodes: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        actor_pool(nodes, Cluster(), 3, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with (
            pytest.raises(
                RuntimeUnavailableError, match=f"cannot join a Ray cluster at '{address}'"
            ),
            joined_cluster(address, b""),
        ):
            pass


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'meancache-trt\[ray\]'"):
        RayRun(
            Opening(tmp_path),
            [],
            options_in(tmp_path),
            Cluster(),
            settings=Settings(),
            defaults=Defaults(),
            limits=Limits(),
        )
    assert not list(tmp_path.iterdir())
