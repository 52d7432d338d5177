"""A run's directory: one set of settings, one measurement, and no litter, whoever comes first."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meancache_trt.errors import InputError, RenderError
from meancache_trt.production.run_folder import GroupSizes, agreed_sizes, open_run, scratch
from tests.production.conftest import RunOnDisk
from tests.production.made import RUN, entries_below

SIZES = GroupSizes(batch_size=4, batches_a_chunk=8)


def test_the_first_makes_a_run_and_others_join_it(tmp_path: Path) -> None:
    out = tmp_path / "none" / "out"
    assert open_run(out, RUN) == RUN
    assert open_run(out, RUN) == RUN
    assert entries_below(out) == {".meancache", ".meancache/run.json", ".meancache/run.lock"}


def test_files_that_are_there_already_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_text("mine")
    open_run(tmp_path, RUN)
    assert (tmp_path / "mine.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"bundle_id": "c" * 64}, f"bundle_id '{'b' * 64}', this one has '{'c' * 64}'"),
        ({"runtime": "cuda"}, "runtime 'onnxruntime', this one has 'cuda'"),
        ({"runtime_version": "2.0"}, r"runtime_version '1\.22\.0', this one has '2\.0'"),
        ({"precision": "bfloat16"}, "precision 'float32', this one has 'bfloat16'"),
        ({"noise": "torch"}, "noise 'philox', this one has 'torch'"),
        ({"vae_tiling": True}, "vae_tiling False, this one has True"),
        ({"formats": ("png", "webp")}, r"formats \('png',\), this one has \('png', 'webp'\)"),
        ({"name_template": "{seed}"}, r"name_template '\{id\}', this one has '\{seed\}'"),
        ({"batch_size": 2}, "batch_size None, this one has 2"),
        ({"text_precision": "checkpoint"}, "text_precision 'float32', this one has 'checkpoint'"),
        ({"noise": "torch", "vae_tiling": True}, "noise .*; vae_tiling False"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    changed: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    open_run(tmp_path, RUN)
    wanted = msgspec.structs.replace(RUN, **changed)
    with pytest.raises(InputError, match=f"was begun with {difference}.*another output directory"):
        open_run(tmp_path, wanted)
    assert open_run(tmp_path, RUN) == RUN


def test_another_version_of_the_runtime_is_allowed_on_request_alone(tmp_path: Path) -> None:
    open_run(tmp_path, RUN)
    newer = msgspec.structs.replace(RUN, runtime_version="2.0")
    assert open_run(tmp_path, newer, is_any_version_allowed=True) == RUN
    other = msgspec.structs.replace(newer, runtime="cuda")
    with pytest.raises(
        InputError, match=r"begun with runtime 'onnxruntime', this one has 'cuda'\."
    ):
        open_run(tmp_path, other, is_any_version_allowed=True)


def open_at_once(directory: Path, seed: int, barrier: Any, results: Any) -> None:
    """In a process of its own: settings of its own, of which one process's win."""
    wanted = msgspec.structs.replace(RUN, name_template=f"{seed}-{{id}}")
    barrier.wait()
    try:
        results.put(open_run(directory, wanted).name_template)
    except InputError as error:
        results.put(error.args[0])


def test_of_processes_that_come_at_once_one_makes_the_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=open_at_once, args=(tmp_path / "a" / "out", seed, barrier, results))
        for seed in range(3)
    ]
    for worker in workers:
        worker.start()
    found = sorted((results.get() for _ in workers), key=len)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert found[0] in {f"{seed}-{{id}}" for seed in range(3)}
    assert all(f"name_template '{found[0]}', this one has" in text for text in found[1:])


def test_one_measures_a_group_and_all_use_it(tmp_path: Path) -> None:
    open_run(tmp_path, RUN)
    measured: list[int] = []
    found: list[GroupSizes] = []

    def measure() -> GroupSizes:
        measured.append(1)
        time.sleep(0.05)
        return SIZES

    def work() -> None:
        found.append(agreed_sizes(tmp_path, "a", measure))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [SIZES] * 4
    assert measured == [1]
    other = GroupSizes(1, 1)
    assert agreed_sizes(tmp_path, "b", lambda: other) == other
    assert open_run(tmp_path, RUN).sizes == {"a": SIZES, "b": other}


def test_a_measurement_that_fails_is_left_to_the_next(tmp_path: Path) -> None:
    open_run(tmp_path, RUN)

    def fail() -> GroupSizes:
        raise RenderError("no memory")

    with pytest.raises(RenderError):
        agreed_sizes(tmp_path, "a", fail)
    assert agreed_sizes(tmp_path, "a", lambda: SIZES) == SIZES


@pytest.mark.parametrize("content", ["", "{}", '{"schema": "meancache-trt/run/2"}', "\0"])
def test_a_damaged_record_is_named_and_kept(content: str, tmp_path: Path) -> None:
    open_run(tmp_path, RUN)
    path = tmp_path / ".meancache" / "run.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"run\.json, the settings of the run .*give another"):
        open_run(tmp_path, RUN)
    assert path.read_text() == content


@pytest.mark.parametrize("name", ["out", "out/.meancache", "parent"])
def test_a_file_in_the_way_is_refused_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = entries_below(tmp_path)
    out = path / "out" if name == "parent" else tmp_path / "out"
    with pytest.raises(InputError, match="cannot create"):
        open_run(out, RUN)
    assert entries_below(tmp_path) == before
    assert path.read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(on_small_disk: RunOnDisk) -> None:
    """In a new directory and in one that is there; then there is room and both begin."""
    printed = on_small_disk("""
        from meancache_trt.production.run_folder import agreed_sizes, open_run, scratch, GroupSizes

        def fails(work):
            try:
                work()
            except InputError as error:
                print(error)
            else:
                print("done")

        (disk / "old").mkdir()
        fill()
        fails(lambda: open_run(disk / "new" / "out", RUN))
        fails(lambda: open_run(disk / "old", RUN))
        print(*sorted(entries_below(disk)))
        (disk / "filler").unlink()
        fails(lambda: open_run(disk / "old", RUN))
        fill()
        fails(lambda: agreed_sizes(disk / "old", "a", lambda: GroupSizes(1, 1)))
        print(open_run(disk / "old", RUN) == RUN)
        make_read_only()
        fails(lambda: open_run(disk / "old", RUN))
        fails(lambda: open_run(disk / "third", RUN))
    """)
    first, second, entries, again, sizes, is_kept, locked, third = printed.splitlines()
    for line in (first, second, sizes):
        assert "run.json: No space left on device" in line
    assert entries == "filler old"
    assert again == "done"
    assert is_kept == "True"
    assert "run.lock: Read-only file system" in locked
    assert "cannot create" in third


def test_scratch_lies_beside_the_outputs_and_goes_with_its_files(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder, scratch(tmp_path) as other:
        assert folder.parent == other.parent == tmp_path / ".meancache"
        assert folder != other
        (folder / "a.png").write_bytes(b"half")
    assert entries_below(tmp_path) == {".meancache", ".meancache/locks"}


def test_scratch_goes_where_the_work_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch(tmp_path) as folder:
            (folder / "a.png").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert entries_below(tmp_path) == {".meancache", ".meancache/locks"}


def hold_scratch(directory: Path, ready: Any) -> None:
    """In a process of its own, until it is killed."""
    with scratch(directory) as folder:
        (folder / "a.png").write_bytes(b"half")
        ready.send(folder)
        time.sleep(600)


def test_what_a_killed_process_left_is_removed_and_what_others_use_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    workers = [context.Process(target=hold_scratch, args=(tmp_path, sender)) for _ in range(2)]
    for worker in workers:
        worker.start()
    first, second = receiver.recv(), receiver.recv()
    (tmp_path / ".meancache" / "mine").mkdir()
    try:
        with scratch(tmp_path):
            assert (first / "a.png").exists()
            assert (second / "a.png").exists()
        workers[0].kill()
        workers[0].join()
        with scratch(tmp_path) as own:
            left = {path for path in (first, second) if path.exists()}
            assert len(left) == 1
            assert (left.pop() / "a.png").exists()
            assert own.exists()
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    with scratch(tmp_path):
        pass
    assert entries_below(tmp_path) == {".meancache", ".meancache/locks", ".meancache/mine"}


def test_scratch_that_cannot_be_made_is_refused(on_small_disk: RunOnDisk) -> None:
    printed = on_small_disk("""
        from meancache_trt.production.run_folder import scratch

        with scratch(disk):
            pass
        make_read_only()
        try:
            with scratch(disk):
                raise AssertionError("it is read-only")
        except InputError as error:
            print(error)
        print(*sorted(entries_below(disk)))
    """)
    assert "Read-only file system" in printed
    assert printed.splitlines()[1] == ".meancache .meancache/locks"


def leave_unfinished(directory: Path, ready: Any) -> None:
    """In a process of its own, until it is killed: a scratch directory and half a record."""
    open_run(directory, RUN)
    with scratch(directory) as folder:
        (folder / "half.png").touch()
        (directory / ".meancache" / ".run.json.abc.json").touch()
        ready.send(folder.name)
        time.sleep(600)


def test_what_a_killed_process_left_goes_with_the_next_and_with_those_that_outlive_it(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=leave_unfinished, args=(tmp_path, sender))
    open_run(tmp_path, RUN)
    with scratch(tmp_path) as own:
        worker.start()
        left = tmp_path / ".meancache" / receiver.recv()
        worker.kill()
        worker.join()
        assert left.exists()
    assert not own.exists()
    assert not left.exists()
    assert (tmp_path / ".meancache" / ".run.json.abc.json").exists()
    open_run(tmp_path, RUN)
    assert not (tmp_path / ".meancache" / ".run.json.abc.json").exists()
    assert not list(tmp_path.glob(".meancache/tmp-*"))
