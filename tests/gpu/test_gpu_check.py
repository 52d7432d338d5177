from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scripts.gpu import correctness, memory, overhead, record
from scripts.gpu.bank import share_values
from scripts.gpu.bench import Bench, Pair, Settings
from scripts.gpu.record import Check, Part, Record, Subject, with_part
from scripts.gpu.table import markdown
from scripts.gpu.timing import interleaved_ms
from scripts.gpu.watched import PlainSequence, Watched

from meancache_trt.bundle import Bundle
from meancache_trt.engine.probe import probe
from meancache_trt.engine.tensorrt.runtime import TensorRtRuntime
from meancache_trt.errors import InputError
from meancache_trt.export.safetensors_file import read_tensors
from meancache_trt.graphs import Graphs
from meancache_trt.meancache.runtime import Call
from meancache_trt.render import Pipeline
from meancache_trt.session import Session
from tests.fake_driver import driver_environment
from tests.fakes.cuda import FakeDevice
from tests.fakes.plans import plan_everything
from tests.fakes.tensorrt import fake_library

ROOT = Path(__file__).parents[2]
DRIVER = probe()
SUBJECT = Subject(
    gpu="A GPU", compute_capability="8.9", cuda_version="13.0", versions={}, commit=""
)


def gpu_check(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "scripts/gpu_check", *map(str, arguments)]
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_slices_are_listed():
    listed = gpu_check("--list").stdout.splitlines()
    names = [line.split()[0] for line in listed]
    assert names == [
        *("facts", "prepare", "correctness", "overhead", "memory"),
        *("real-size-prepare", "real-size"),
    ]


@pytest.mark.skipif(bool(DRIVER.gpus), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing():
    before = sorted((ROOT / "docs/gpu").iterdir())
    done = gpu_check("facts", "overhead")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no GPU, so nothing was run and nothing written" in line
    assert "facts, overhead" in line
    assert sorted((ROOT / "docs/gpu").iterdir()) == before


def test_an_unknown_slice_is_wrong_usage():
    done = gpu_check("speed")
    assert done.returncode == 2
    assert "no slice speed; there are facts" in done.stderr


def test_parts_of_several_calls_add_to_the_record_that_is_named(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    environment = driver_environment(tmp_path, "MAJOR=9", "MINOR=0")
    path = tmp_path / "gpu.json"
    for slices in (["facts"], ["overhead"]):
        gpu_check(*slices, "--work", tmp_path, "-o", path, "--limit", 0, **environment)
    found = msgspec.json.decode(path.read_bytes(), type=Record)
    assert found.subject.gpu == "Fake GPU"
    assert list(found.parts) == ["facts", "overhead"]
    assert not found.is_rehearsal
    assert "# Fake GPU" in path.with_suffix(".md").read_text()
    absent = {check.backend: check.note for check in found.parts["overhead"].checks}
    assert "builds for 7.5, 8.0, 8.6, 8.9, 12.0" in absent["tensorrt_rtx"]


def test_a_rehearsal_runs_every_quick_slice_and_is_marked_as_one(bundle, tmp_path):
    bundle.rename(tmp_path / "flux.mcb")
    slices = ["facts", "prepare", "correctness", "overhead", "memory"]
    done = gpu_check("--rehearse", "--work", tmp_path, *slices, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-check-*/rehearsal-*.json")
    found = msgspec.json.decode(path.read_bytes(), type=Record)
    assert found.is_rehearsal
    assert list(found.parts) == slices
    checks = [check for part in found.parts.values() for check in part.checks]
    assert all(check.note for check in checks if check.verdict == "skipped")
    assert all(check.reason for check in checks if check.verdict == "passed")
    assert {"latents", "NaN that was not reported", "VAE tiled", "gain of one graph"} <= {
        check.name for check in checks
    }
    assert "**A rehearsal**" in path.with_suffix(".md").read_text()


@pytest.fixture
def pair(pipeline: Pipeline, shared_bundle: Path) -> Iterator[Pair]:
    """The shared bundle beside itself."""
    with Pipeline(Bundle.open(shared_bundle), embedding_cache="off") as tested:
        yield Pair("onnxruntime", "flux", tested, pipeline, is_short=True)


@dataclass(frozen=True)
class Replaced:
    """A runtime of which one thing is done otherwise."""

    runtime: Any
    sequence: Callable[[Sequence[Call]], Call]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runtime, name)


@pytest.fixture
def strict(bundle: Path, pipeline: Pipeline, tmp_path: Path) -> Iterator[Pair]:
    """The strict fake of TensorRT, on the same bundle: it stands for the orchestration alone."""
    opened = Bundle.open(bundle)
    plan_everything(opened)
    device = FakeDevice()
    library, _ = fake_library(device, "tensorrt_rtx")
    with (
        TensorRtRuntime(opened, library, device, cache_directory=tmp_path / "cache") as runtime,
        Pipeline(opened, runtime=runtime, embedding_cache="off") as tested,
    ):
        yield Pair("tensorrt_rtx", "flux", tested, pipeline, is_short=True)


def test_the_strict_fake_passes_every_check(strict):
    skipped = {"memory of a host"}  # torch's host memory is not aligned as a GPU's is
    found = {
        name: Bench(settings(limit_s=600)).attempt(name, lambda check=check: check(strict), "", "")
        for name, check in correctness.CHECKS.items()
        if name not in skipped
    }
    checks = [check for some in found.values() for check in some]
    assert not [check for check in checks if check.verdict == "failed"]
    assert {check.name: check.verdict for check in checks}["loop captured"] == "passed"


def test_the_strict_fake_is_measured(strict):
    bench = Bench(settings(limit_s=600))
    loops = bench.attempt("loop", lambda: overhead.loop_times(strict, 2), "", "")
    blocks = bench.attempt("blocks", lambda: memory.activations_are_shared(strict), "", "")
    assert {check.verdict for check in (*loops, *blocks)} == {"measured"}
    shared, total = (check.value for check in blocks)
    assert shared < total


def verdicts(check: Callable[[Pair], Check | Iterable[Check]], pair: Pair) -> list[str]:
    found = check(pair)
    return [one.verdict for one in ([found] if isinstance(found, Check) else found)]


@pytest.mark.parametrize(
    ("check", "length"),
    [
        (correctness.latents_equal_the_reference, "all"),
        (correctness.pictures_equal_the_reference, "all"),
        (correctness.a_captured_graph_equals_plain_calls, "all"),
        (correctness.a_callback_changes_nothing, "one evaluation"),
    ],
)
def test_a_runtime_that_leaves_out_a_call_fails(pair, check, length):
    assert set(verdicts(check, pair)) <= {"passed", "skipped"}

    def short(calls: Sequence[Call]) -> Call:
        is_cut = (len(calls) > 2) == (length == "all")
        return PlainSequence(tuple(calls)[: -1 if is_cut else None])

    runtime = pair.tested.runtime = Replaced(pair.tested.runtime, short)
    pair.tested.graphs = Graphs(pair.tested.bundle, runtime)
    spoilt = Pair("onnxruntime", "flux", pair.tested, pair.reference, is_short=True)
    assert "failed" in verdicts(check, spoilt)


def test_a_runtime_that_hides_nan_fails(pair):
    class Tidy(PlainSequence):
        def enqueue(self) -> None:
            super().enqueue()
            for session in made:
                latent = session.loop.final
                latent.write(np.nan_to_num(latent.read()))

    made: list[Session] = []
    runtime = Replaced(pair.tested.runtime, lambda calls: Tidy(tuple(calls)))
    pair.tested.graphs = Graphs(pair.tested.bundle, runtime)

    class Kept(Pair):
        def session(self, **options: Any) -> Session:
            made.append(super().session(**options))
            return made[-1]

    spoilt = Kept("onnxruntime", "flux", pair.tested, pair.reference, is_short=True)
    assert verdicts(correctness.nan_is_reported_and_forgotten, spoilt)[0] == "failed"


def settings(*, limit_s: float) -> Settings:
    return Settings(
        work=Path(),
        backends=(),
        subjects=(),
        is_rehearsal=True,
        rounds=1,
        cycles=1,
        limit_s=limit_s,
    )


def test_a_check_that_breaks_is_a_failed_one():
    def broken() -> Check:
        raise RuntimeError("no such kernel")

    (check,) = Bench(settings(limit_s=60)).attempt("loop", broken, "tensorrt", "flux")
    assert check == Check(
        name="loop",
        backend="tensorrt",
        subject="flux",
        verdict="failed",
        note="RuntimeError: no such kernel",
    )


def test_a_slice_whose_time_is_over_skips_the_rest():
    (check,) = Bench(settings(limit_s=-1)).attempt("loop", pytest.fail, "tensorrt", "flux")
    assert check.verdict == "skipped"
    assert "were over" in check.note


@pytest.mark.parametrize(
    ("value", "is_lower", "verdict"),
    [(1.0, False, "passed"), (3.0, False, "failed"), (3.0, True, "passed"), (1.0, True, "failed")],
)
def test_a_bound_is_an_upper_or_a_lower_one(value, is_lower, verdict):
    assert record.judged("x", value, 2.0, is_lower=is_lower, reason="").verdict == verdict


@pytest.mark.parametrize("is_lower", [False, True])
def test_nan_passes_no_bound(is_lower):
    check = record.judged("x", float("nan"), 2.0, is_lower=is_lower, reason="")
    assert check.verdict == "failed"


def part(*checks: Check) -> Part:
    return Part(started_at="2026-01-01T00:00:00+00:00", seconds=1.0, checks=checks)


def test_slices_of_several_calls_become_one_record(tmp_path):
    path, blank = tmp_path / "gpu.json", Record(is_rehearsal=False, subject=SUBJECT)
    with_part(path, blank, "facts", part())
    with_part(path, blank, "overhead", part(record.measured("loop", 3.0, "ms")))
    whole = with_part(path, blank, "facts", part(record.failed("doctor", "it broke")))
    assert list(whole.parts) == ["facts", "overhead"]
    assert [check.name for check in whole.failed] == ["doctor"]
    assert msgspec.json.decode(path.read_bytes(), type=Record) == whole


def test_what_was_found_of_other_stand_ins_stays(tmp_path):
    path, blank = tmp_path / "gpu.json", Record(is_rehearsal=False, subject=SUBJECT)
    flux, qwen = (
        Check(name="latents", backend="tensorrt", subject=subject, verdict="passed", reason="x")
        for subject in ("flux", "qwen_image")
    )
    with_part(path, blank, "correctness", part(flux, msgspec.structs.replace(qwen, note="old")))
    whole = with_part(path, blank, "correctness", part(qwen))
    assert whole.parts["correctness"].checks == (flux, qwen)
    assert whole.parts["correctness"].seconds == 2.0


def test_a_record_takes_no_part_of_another_gpu(tmp_path):
    path, blank = tmp_path / "gpu.json", Record(is_rehearsal=False, subject=SUBJECT)
    with_part(path, blank, "facts", part())
    other = msgspec.structs.replace(SUBJECT, gpu="Another GPU")
    with pytest.raises(InputError, match="Another GPU"):
        with_part(path, msgspec.structs.replace(blank, subject=other), "facts", part())


def test_the_table_says_what_was_skipped_and_why_bounds_are_what_they_are():
    checks = (
        record.skipped("external stream", "torch is not installed"),
        record.judged("latents", 0.1, 0.5, reason="bfloat16 rounds"),
    )
    text = markdown(Record(is_rehearsal=False, subject=SUBJECT, parts={"facts": part(*checks)}))
    assert "- external stream: torch is not installed" in text
    assert "| latents |  |  | 0.1 | ≤ 0.5 | passed |  |" in text
    assert "- latents: bfloat16 rounds" in text
    assert "rehearsal" not in text


def test_ways_take_turns():
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved_ms(ways, lambda: None, 2, warm_ups=1)
    assert "".join(order) == "ababab"
    assert all(value >= 0 for value in times.values())


def test_a_watched_runtime_keeps_the_calls_of_each_graph(pair):
    watched = Watched(pair.tested.runtime)
    session = pair.session(runtime=watched)
    pair.render(session, pair.requests[:1])
    counts = {path.name: len(calls) for path, calls in watched.calls.items()}
    assert counts["prepare.onnx"] == 1
    bundle = pair.tested.bundle
    network = bundle.component_path(pair.tested.graphs.network("transformer"))
    assert len(watched.calls[network]) == pair.schedule.budget


def test_shared_values_take_little_disk_and_differ(tmp_path):
    tensors = {f"blocks.{n}.weight": np.zeros((64, 256), np.int16) for n in range(16)}
    tensors |= {f"norms.{n}.weight": np.zeros(128, np.int16) for n in range(3)}
    file = tmp_path / "model.safetensors"
    torch_tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}
    save_file({name: value.view(torch.bfloat16) for name, value in torch_tensors.items()}, file)
    before, whole = read_tensors(file), file.stat().st_size
    share_values(tmp_path)
    after = read_tensors(file)
    assert file.stat().st_size < whole / 8
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    contents = {name: values_of(tensor) for name, tensor in after.items()}
    blocks = {values.tobytes() for name, values in contents.items() if name.startswith("blocks")}
    assert len(blocks) == 16
    assert all((contents[f"norms.{n}.weight"] == 1).all() for n in range(3))
    deviation = np.std(contents["blocks.15.weight"])
    assert 0.019 < deviation < 0.021  # 16,384 normal values of 0.02: 0.6 % of it


def values_of(tensor: Any) -> np.ndarray:
    stored = np.memmap(tensor.file, mode="r")[tensor.offset : tensor.offset + tensor.length]
    return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not DRIVER.gpus, reason=str(DRIVER.problem))
def test_every_backend_on_the_gpu_is_correct(bundle, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    shutil.move(bundle, work / "flux.mcb")
    path = tmp_path / "record.json"
    done = gpu_check("correctness", "--stand-in", "flux", "--work", work, "-o", path)
    found = json.loads(path.read_text())["parts"]["correctness"]["checks"]
    assert done.returncode == 0, [check for check in found if check["verdict"] == "failed"]
