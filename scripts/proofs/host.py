"""The C++ host: memory, damaged bundles, fuzzers, and what the loop costs against Python's.

    scripts/prove host [--cycles 100] [--mutations 1000] [--fuzz-seconds 60] [--rounds 15]

Times are taken in one run, alternating between the hosts; only their ratios travel. The hosts run
the same graphs by different libraries (OpenVINO and ONNX Runtime), so the loop alone is measured
with graphs that do nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from scripts.host.building import ROOT, build, build_host, run
from scripts.host.first_image import peak_bytes
from scripts.host.idle_runtime import idle_loop
from scripts.host.memory import valgrind
from scripts.host.mutations import copied, mutate
from tests.export.tiny_flux import tiny_pipeline

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.engine.native import NativeBundle, NativeLibrary
from meancache_trt.errors import MeanCacheError
from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.render import Pipeline

HOST, FUZZ = ROOT / "build" / "host", ROOT / "build" / "fuzz"
LIBRARY = HOST / "prefix" / "lib" / "libmeancache_trt.so"
PROMPT = "a small red circle at the top left"
NODES, SPANS = (0, 1, 3, 7, 14, 21, 28, 35, 42, 49), (1, 2, 1, 1, 1, 1, 1, 1, 4)


def main() -> None:
    """Run all measurements, or the parts that are named, and add them to the record."""
    options = _options()
    if options.worker is not None:
        _mutations(options.worker, options.mutations)
        return
    build_host(HOST)
    target = ROOT / "docs" / "proof" / "host.json"
    record = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        bundle = _bundle(Path(work))
        parts: dict[str, Callable[[], Any]] = {
            "machine": lambda: {"cores": len(os.sched_getaffinity(0)), "backend": _backend(bundle)},
            "valgrind": lambda: _valgrind(_tiny_bundle(Path(work)), options.cycles),
            "mutated_bundles": lambda: _mutated(bundle, options.mutations),
            "fuzzers": lambda: _fuzzers(bundle, options.fuzz_seconds),
            "loop_us_per_evaluation": lambda: _loop(options.rounds),
            "standin_ms_per_evaluation": lambda: _standin(bundle, options.rounds),
            "first_image": lambda: _first_image(bundle, 5),
            "library_bytes": lambda: LIBRARY.resolve().stat().st_size,
        }
        for name in options.parts or parts:
            record[name] = parts[name]()
            target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    faults = record["valgrind"]["status"] or record["mutated_bundles"]["accepted"]
    crashes = [entry for entry in record["fuzzers"].values() if entry["crashes"]]
    sys.exit("the host failed; see above" if faults or crashes else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=100, help="sessions under valgrind")
    parser.add_argument("--mutations", type=int, default=1000, help="damaged bundles")
    parser.add_argument("--fuzz-seconds", type=int, default=60, help="for each fuzzer")
    parser.add_argument("--rounds", type=int, default=15, help="timed repetitions of each")
    parser.add_argument("--parts", nargs="*", help="measure only these members of the record")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _bundle(work: Path) -> Path:
    """The FLUX stand-in with two schedules, and one encoded prompt beside it."""
    checkpoint = stages.find_model("standin/flux")
    exporting = stages.ExportOptions(size=(64, 64), is_parity_checked=False)
    path = work / "flux.mcb"
    bundle = stages.export(checkpoint, path, exporting, note=lambda _: None, is_forced=False)
    with Pipeline(bundle, threads=1, embedding_cache="off") as pipeline:
        grid = pipeline.grid(50)
        pipeline.encode([PROMPT]).save(_prompt(path))
    bundle.add_schedule(bake("official", grid, NODES, SPANS, name="b10"))
    return path


def _tiny_bundle(work: Path) -> Path:
    """Random networks of a few kilobytes: valgrind takes a hundred times as long for everything."""
    tiny_pipeline().save_pretrained(work / "tiny")
    exporting = stages.ExportOptions(size=(32, 48), text_tokens=12, is_parity_checked=False)
    checkpoint, path = stages.find_model(str(work / "tiny")), work / "tiny.mcb"
    bundle = stages.export(checkpoint, path, exporting, note=lambda _: None, is_forced=False)
    bundle.add_schedule(bake("ab2", make_grid(8, shift=3.0), (0, 2, 5), name="b3"))
    return path


def _prompt(bundle: Path) -> Path:
    return bundle.with_name("prompt.safetensors")


def _backend(path: Path) -> str:
    with (
        NativeBundle(path, library=NativeLibrary(LIBRARY)) as bundle,
        bundle.session("b10", threads=1) as session,
    ):
        return f"{session.info['backend']} {session.info['backend_version']}"


def _valgrind(bundle: Path, cycles: int) -> dict[str, Any]:
    found = valgrind(HOST / "engine" / "host" / "tests" / "cycles", bundle, str(cycles))
    lost = re.search(r"definitely lost: ([\d,]+) bytes", found.report)
    return {
        "cycles": cycles,
        "status": found.status,
        # Valgrind leaves the line out where nothing at all was left at exit.
        "definitely_lost_bytes": int(lost[1].replace(",", "")) if lost else 0,
    }


def _fuzzers(bundle: Path, seconds: int) -> dict[str, Any]:
    if shutil.which("clang++") is None:
        return {}
    build(FUZZ, [
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DCMAKE_C_COMPILER=clang",
        "-DCMAKE_CXX_COMPILER=clang++", "-DMEANCACHE_TRT_FUZZ=ON", "-DMEANCACHE_TRT_OPENVINO=OFF",
        "-DMEANCACHE_TRT_BUILD_TESTS=OFF", "-DBUILD_SHARED_LIBS=OFF",
    ])  # fmt: skip
    seeds = {
        "manifest": [bundle / "manifest.json"],
        "schedule": [*(bundle / "schedules").iterdir()],
    }
    return {name: _fuzz(name, files, seconds) for name, files in seeds.items()}


def _fuzz(name: str, seeds: list[Path], seconds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as corpus:
        for seed in seeds:
            shutil.copy(seed, corpus)
        command = [
            *(FUZZ / f"engine/host/fuzz/{name}_fuzzer", corpus, "-print_final_stats=1"),
            *(f"-max_total_time={seconds}", "-max_len=65536", f"-artifact_prefix={FUZZ}/"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    return {
        "seconds": seconds,
        "runs": int(runs[1]) if runs else 0,
        "crashes": int(done.returncode != 0),
    }


def _loop(rounds: int) -> dict[str, Any]:
    """The loop alone: graphs that do nothing, B = 50."""
    loop = idle_loop(evaluations=50)
    program = HOST / "engine" / "host" / "tests" / "loop_benchmark"
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        bare, calling = map(float, run(program, "50", "200").split())
        python = [_per_evaluation(loop.run, 50) for _ in range(20)]
        called = [_per_evaluation(lambda: loop.run(lambda *_: None), 50) for _ in range(20)]
        measured = {
            "native": bare / 1e3,
            "native_with_callback": calling / 1e3,
            "python": 1e6 * statistics.median(python),
            "python_with_callback": 1e6 * statistics.median(called),
        }
        for name, value in measured.items():
            times.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def _per_evaluation(work: Callable[[], object], evaluations: int) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) / evaluations


def _standin(path: Path, rounds: int) -> dict[str, float]:
    """A loop of B = 10 on the stand-in, one thread, networks included."""
    prompt = Conditioning.load(_prompt(path))
    times: dict[str, list[float]] = {"native": [], "python": []}
    library = NativeLibrary(LIBRARY)
    with (
        Pipeline(Bundle.open(path), threads=1) as pipeline,
        NativeBundle(path, library=library) as bundle,
        bundle.session("b10", threads=1) as native,
    ):
        native.set_conditioning(prompt.tensors)
        noise = np.zeros(native.noise_shape, np.float32)
        python = pipeline.session(pipeline.schedule("b10"))
        python.run(noise, prompt.tensors, 3.5)
        for _ in range(rounds):
            times["native"].append(1e3 * _per_evaluation(lambda: native.run(noise), 10))
            times["python"].append(1e3 * _per_evaluation(python.loop.run, 10))
    return {name: statistics.median(values) for name, values in times.items()}


def _mutated(bundle: Path, count: int) -> Any:
    """Open damaged bundles, in a process of its own: a crash would be its exit status."""
    command = [sys.executable, __file__, "--worker", str(bundle), "--mutations", str(count)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _mutations(bundle: Path, count: int) -> None:
    chance, accepted = random.Random(0), []
    library = NativeLibrary(LIBRARY)
    target = bundle.with_name("mutated.mcb")
    for _ in range(count):
        copied(bundle, target)
        what = mutate(target, chance)
        try:
            NativeBundle(target, library=library).close()
            accepted.append(what)
        except MeanCacheError:
            pass
        shutil.rmtree(target)
    print(json.dumps({"count": count, "accepted": accepted}))


def _first_image(bundle: Path, rounds: int) -> dict[str, Any]:
    """Medians over processes that alternate; the C++ program's peak is without Python around it."""
    script = ROOT / "scripts" / "host" / "first_image.py"
    found: dict[str, list[dict[str, float]]] = {"native": [], "python": []}
    for _ in range(rounds):
        for name, measured in found.items():
            out = run(sys.executable, script, name, bundle, _prompt(bundle), LIBRARY)
            measured.append(json.loads(out))
    medians: dict[str, Any] = {
        name: {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        for name, entries in found.items()
    }
    program = run(HOST / "engine/host/tests/cycles", bundle, "0")
    return {**medians, "cpp_program_peak_bytes": peak_bytes(program)}


if __name__ == "__main__":
    main()
