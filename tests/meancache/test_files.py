"""Atomic writes: the whole new file or the old one, and nothing else."""

from __future__ import annotations

import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from meancache_trt.errors import InputError
from meancache_trt.meancache.files import atomic_write, encode_json, write_json
from meancache_trt.meancache.schedule import bake, save_schedule
from meancache_trt.meancache.sigmas import make_grid

SCHEDULE = bake("official", make_grid(20, shift=3.0), (0, 1, 3, 7, 14), (1, 2, 3, 4))


def test_a_written_file_is_whole_readable_by_all_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    write_json(path, {"b": 1, "a": [1.5]})
    assert path.read_bytes() == encode_json({"b": 1, "a": [1.5]})
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


WRITE_BEYOND_LIMIT = """
    import resource, sys
    from meancache_trt.errors import InputError
    from meancache_trt.meancache.schedule import load_schedule, save_schedule

    schedule = load_schedule(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        save_schedule(schedule, sys.argv[2])
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    is_replaced: bool, tmp_path: Path
) -> None:
    """A limit of 100 bytes a file stands for the disk: the write fails half-way."""
    source, target = tmp_path / "source.json", tmp_path / "out" / "target.json"
    target.parent.mkdir()
    save_schedule(SCHEDULE, source)
    if is_replaced:
        target.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITE_BEYOND_LIMIT), str(source), str(target)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"cannot write {target}" in done.stdout
    assert "File too large" in done.stdout
    assert done.stderr == ""
    assert list(target.parent.iterdir()) == ([target] if is_replaced else [])
    assert not is_replaced or target.read_text() == "old"


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    # Not a read-only directory, since root may write there too.
    def write_half() -> None:
        with atomic_write(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.json"
    with pytest.raises(InputError, match=r"cannot write .*a\.json: No such file"):
        save_schedule(SCHEDULE, path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_the_way_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        save_schedule(SCHEDULE, tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
