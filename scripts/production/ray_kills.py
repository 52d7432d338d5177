"""A run on local Ray actors that are killed at random moments.

usage: python -m scripts.production.ray_kills BUNDLE JOBS OUTPUT [--kills 5] [--seed 0]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from meancache_trt.media.formats import OutputFormat
from meancache_trt.production.claims import FOLDER
from meancache_trt.production.job_files import read_jobs
from meancache_trt.production.jobs import Limits
from meancache_trt.production.limits import Guard
from meancache_trt.production.names import NameTemplate
from meancache_trt.production.ray_cluster import Cluster
from meancache_trt.production.ray_data import Opening, RayRun, ShareActor
from meancache_trt.production.results import LOG
from meancache_trt.production.run import RunOptions
from meancache_trt.production.snapshot import Snapshot
from meancache_trt.production.tickets import Checker, Defaults, Settings, check_all
from meancache_trt.render import load

_LATEST_S = 0.5
"""A kill follows its row by up to so long: by then an actor is at any of its stages."""


def ray_with_kills(
    bundle: Path, jobs: Path, output: Path, kills: int, seed: int = 0, *, actors: int = 2
) -> dict[str, Any]:
    """Render a job list on local actors, `kills` of which are killed; what was seen and done.

    Ray is started and shut down, or used where this process has started one.
    """
    run = ray_run(bundle, jobs, output, actors)
    seen, ended = Counter[str](), threading.Event()
    moments = moments_of(kills, run.snapshot().left, seed)
    killer = threading.Thread(target=_kill_all, args=(output, moments, seen, ended))
    killer.start()
    try:
        snapshot = run.run(threading.Event())
    finally:
        ended.set()
        killer.join()
    return _told(snapshot, output, seen)


def ray_run(
    bundle: Path, jobs: Path, output: Path, actors: int, *, min_free_bytes: int = 0
) -> RayRun:
    """A run of all jobs of a file, all of which have to be sound."""
    settings, defaults, limits = Settings(), Defaults(), Limits()
    with load(bundle, backend="onnxruntime", threads=1, embedding_cache="off") as pipeline:
        checker = Checker(pipeline, settings, defaults, limits)
        tickets, _ = check_all(read_jobs(jobs), checker, skip_bad=False)
    return RayRun(
        Opening(bundle, "onnxruntime", threads=1, embedding_cache="off"),
        tickets,
        RunOptions(
            output,
            formats=(OutputFormat("png"),),
            names=NameTemplate.parse("{id}"),
            guard=Guard(output, min_free_bytes),
        ),
        Cluster(actors=actors),
        settings=settings,
        defaults=defaults,
        limits=limits,
    )


def moments_of(kills: int, jobs: int, seed: int) -> list[tuple[int, float, float]]:
    """For each kill how many rows there are, how many seconds later, and which actor (0 to 1)."""
    chance = random.Random(seed)
    rows = sorted(chance.randrange(max(jobs, 1)) for _ in range(kills))
    return [(count, chance.uniform(0, _LATEST_S), chance.random()) for count in rows]


def _kill_all(
    output: Path,
    moments: list[tuple[int, float, float]],
    seen: Counter[str],
    ended: threading.Event,
) -> None:
    for rows, delay_s, which in moments:
        while not ended.is_set() and (_rows(output) < rows or not actors_alive()):
            ended.wait(0.01)
        ended.wait(delay_s)
        alive = actors_alive()
        if ended.is_set() or not alive:
            seen["ended before"] += 1
            continue
        actor = alive[int(which * len(alive))]
        with contextlib.suppress(psutil.Error):  # it may have ended just now
            held = claims_of(actor)
            actor.kill()
            seen["kills"] += 1
            seen["kills amid a chunk"] += held > 0


def actors_alive() -> list[psutil.Process]:
    """Processes of the actors of a Ray that this process has started: Ray names them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if ShareActor.__name__ in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def claims_of(actor: psutil.Process) -> int:
    """How many chunks a process holds: the lock files that it has open, but for its scratch's."""
    paths = [Path(file.path) for file in actor.open_files()]
    locks = [path.name for path in paths if path.parts[-3:-1] == (FOLDER, "locks")]
    return sum(not name.startswith("tmp-") for name in locks)


def _rows(output: Path) -> int:
    try:
        return (output / LOG).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _told(snapshot: Snapshot, output: Path, seen: Counter[str]) -> dict[str, Any]:
    rows = [json.loads(line) for line in (output / LOG).read_text(encoding="utf-8").splitlines()]
    return {
        "jobs": snapshot.jobs,
        "earlier": snapshot.earlier,
        "done": snapshot.done,
        "failed": snapshot.failed,
        "rows": len(rows),
        "rows of distinct jobs": len({row["id"] for row in rows}),
        "pictures": len(list(output.rglob("*.png"))),
        "elapsed_s": round(snapshot.elapsed_s, 2),
        **seen,
    }


def main() -> None:
    """Print the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bundle", "jobs", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    counts = ray_with_kills(
        options.bundle, options.jobs, options.output, options.kills, options.seed
    )
    print(json.dumps({**counts, "with Ray's start and end_s": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
