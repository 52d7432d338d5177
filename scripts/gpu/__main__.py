"""Run slices and write the record: scripts/gpu_check [SLICE...]."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from scripts.gpu import correctness, facts, memory, overhead, prepare, real_size
from scripts.gpu.bench import REFERENCE, Bench, Settings, gpu_backends
from scripts.gpu.record import Check, Part, Record, Subject, failed, path_of, with_part
from scripts.gpu.table import line, markdown

from meancache_trt import standins
from meancache_trt.engine.probe import Driver, probe
from meancache_trt.errors import MeanCacheError
from meancache_trt.meancache.files import atomic_write

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings", "torch")


@dataclass(frozen=True)
class Slice:
    """What can be asked for by name."""

    name: str
    about: str
    run: Callable[[Bench], Iterator[Check]]


SLICES = (
    Slice(facts.NAME, facts.ABOUT, facts.run),
    Slice(prepare.NAME, prepare.ABOUT, prepare.run),
    Slice(correctness.NAME, correctness.ABOUT, correctness.run),
    Slice(overhead.NAME, overhead.ABOUT, overhead.run),
    Slice(memory.NAME, memory.ABOUT, memory.run),
    Slice(real_size.PREPARE, real_size.PREPARE_ABOUT, real_size.prepare),
    Slice(real_size.NAME, real_size.ABOUT, real_size.run),
)


def main() -> int:
    """Exit status 0 where nothing failed, 1 where something did or there is no GPU."""
    options = _parsed()
    if options.list:
        print("\n".join(f"{one.name:18} {one.about}" for one in SLICES))
        return 0
    wanted = [one for one in SLICES if not options.slices or one.name in options.slices]
    driver = probe()
    if not driver.gpus and not options.rehearse:
        names = ", ".join(one.name for one in wanted)
        print(
            f"no GPU, so nothing was run and nothing written: {driver.problem}; it would have run "
            f"{names}. --rehearse tries the script itself on the CPU",
            file=sys.stderr,
        )
        return 1
    try:
        return _run(wanted, options, driver)
    except MeanCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description="Show on an NVIDIA GPU what can be shown only there. Each slice takes less "
        "than ten minutes; run them in one call or several, they add to one record.",
    )
    names = [one.name for one in SLICES]
    parser.add_argument("slices", nargs="*", metavar="SLICE", help=f"{', '.join(names)}; or all")
    parser.add_argument("--list", action="store_true", help="say what each slice is about")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="try the script: ONNX Runtime on the CPU in the GPU's place, tiny sizes, a record in "
        "a temporary folder",
    )
    parser.add_argument("-o", "--output", type=Path, help="the record; by default in docs/gpu")
    parser.add_argument(
        "--work",
        type=Path,
        help="where bundles and plans are kept between calls; by default build/gpu-check",
    )
    parser.add_argument("--backend", action="append", help="only this one; may be repeated")
    parser.add_argument(
        "--stand-in", action="append", choices=standins.names(), help="only this; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed repetitions of each")
    parser.add_argument("--cycles", type=int, default=100, help="of the check for leaks")
    parser.add_argument("--limit", type=float, default=540, metavar="S", help="time of a slice")
    parser.add_argument(
        "--blocks",
        type=lambda text: tuple(map(int, text.split(","))),
        metavar="N,M",
        help="of the network of real size; by default as many of 19,38 as there is room for",
    )
    options = parser.parse_args()
    unknown = set(options.slices) - {*names}
    if unknown:
        parser.error(f"no slice {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


def _run(wanted: list[Slice], options: argparse.Namespace, driver: Driver) -> int:
    subject = _subject(driver, is_rehearsal=options.rehearse)
    date = datetime.now(UTC).date().isoformat()
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-")) if options.rehearse else _ROOT / "docs/gpu"
    path = path_of(folder, subject, date)
    if options.output is not None and not options.rehearse:
        path = options.output
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = _settings(options, folder, driver)
    blank = Record(is_rehearsal=options.rehearse, subject=subject)
    record = blank
    for one in wanted:
        record = with_part(path, blank, one.name, _part(one, settings))
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(record), encoding="utf-8")
    print(markdown(record))
    print(f"wrote {path}", file=sys.stderr)
    return 1 if record.failed else 0


def _settings(options: argparse.Namespace, folder: Path, driver: Driver) -> Settings:
    backends, absent = ([REFERENCE], []) if options.rehearse else gpu_backends(driver)
    backends = [name for name in backends if not options.backend or name in options.backend]
    everything = ["flux"] if options.rehearse else standins.names()
    work = options.work or (folder if options.rehearse else _ROOT / "build/gpu-check")
    work.mkdir(parents=True, exist_ok=True)
    return Settings(
        work=work,
        backends=tuple(backends),
        subjects=tuple(options.stand_in or everything),
        is_rehearsal=options.rehearse,
        rounds=3 if options.rehearse else options.rounds,
        cycles=3 if options.rehearse else options.cycles,
        limit_s=options.limit,
        absent=tuple(absent),
        precisions=() if options.rehearse else _precisions(driver),
        blocks=options.blocks,
    )


def _precisions(driver: Driver) -> tuple[str, ...]:
    """What the first GPU computes fast in: Turing, 7.5, has no bfloat16. None without a GPU."""
    if not driver.gpus:
        return ()
    major = int(driver.gpus[0].compute_capability.partition(".")[0])
    return ("bfloat16",) if major >= 8 else ("float16",)


def _part(one: Slice, settings: Settings) -> Part:
    """Run a slice and say each check as it is made."""
    started_at, begin = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    checks: list[Check] = []
    absent = () if one.name == facts.NAME else settings.absent
    try:
        for check in itertools.chain(absent, one.run(Bench(settings))):
            print(line(check), file=sys.stderr, flush=True)
            checks.append(check)
    except Exception as error:
        checks.append(failed(one.name, f"{type(error).__name__}: {error}"))
        print(line(checks[-1]), file=sys.stderr)
    seconds = round(time.monotonic() - begin, 1)
    return Part(started_at=started_at, seconds=seconds, checks=tuple(checks))


def _subject(driver: Driver, *, is_rehearsal: bool) -> Subject:
    gpu = driver.gpus[0] if driver.gpus else None
    return Subject(
        gpu="rehearsal" if is_rehearsal or gpu is None else gpu.name,
        compute_capability="none" if gpu is None else gpu.compute_capability,
        cuda_version=driver.cuda_version or "none",
        versions={name: version for name in _PACKAGES if (version := _version(name))},
        commit=_commit(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
