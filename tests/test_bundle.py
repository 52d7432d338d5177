from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from scripts.host.mutations import sealed

from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.errors import BundleError, InputError, ScheduleError
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import make_grid


def replace(path: Path, content: bytes) -> None:
    """Write a new file, so that hard links to the old one keep their content."""
    path.unlink()
    path.write_bytes(content)


def small_schedule(name: str) -> Schedule:
    return bake("euler", make_grid(4), [0, 2], name=name)


def test_missing_directory_is_named_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(BundleError, match=r"no such directory.*meancache-trt build"):
        Bundle.open(tmp_path / "absent.mcb")


def test_directory_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("size", [0, 10, -2])
def test_truncated_manifest_is_refused(bundle, size):
    path = bundle / "manifest.json"
    replace(path, path.read_bytes()[:size])
    with pytest.raises(BundleError, match="build the bundle again"):
        Bundle.open(bundle)


def test_edited_manifest_is_refused(bundle):
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["export"]["text_tokens"] += 1
    replace(path, json.dumps(manifest).encode())
    with pytest.raises(BundleError, match="edited or damaged"):
        Bundle.open(bundle)


def test_a_bundle_of_an_older_version_that_knew_fewer_fields_opens(bundle):
    path, before = bundle / "manifest.json", Bundle.open(bundle).manifest
    manifest = json.loads(path.read_bytes())
    del manifest["export"]["second_stage"]
    replace(path, sealed(manifest))
    found = Bundle.open(bundle)
    assert found.export == before.export
    assert found.manifest.digest != before.digest
    found.add_schedule(small_schedule("later"))
    assert "later" in Bundle.open(bundle).schedule_names()


def test_every_file_is_missed_when_it_is_gone(bundle):
    names = list(Bundle.open(bundle).manifest.files)
    for name in names:
        (bundle / name).rename(bundle / "aside")
        with pytest.raises(BundleError, match="lacks") as failure:
            Bundle.open(bundle)
        assert name in str(failure.value)
        (bundle / "aside").rename(bundle / name)
    Bundle.open(bundle)


def test_every_file_is_checked_for_truncation_and_altered_bytes(bundle):
    for name in Bundle.open(bundle).manifest.files:
        path = bundle / name
        content = path.read_bytes()
        replace(path, content[:-1])
        with pytest.raises(BundleError, match=r"damaged: expected \d+ bytes, found \d+"):
            Bundle.open(bundle)
        middle = len(content) // 2
        altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        replace(path, altered)
        with pytest.raises(BundleError, match="altered: expected SHA-256"):
            Bundle.open(bundle)
        replace(path, content)
    Bundle.open(bundle)


def test_weights_altered_behind_unchanged_times_are_found_by_a_full_check(bundle):
    path = next(bundle.glob("transformer/*.safetensors"))
    content = bytearray(path.read_bytes())
    replace(path, bytes(content))
    Bundle.open(bundle)
    status = path.stat()
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match="altered"):
        Bundle.open(bundle, is_full_check=True)


def test_schedules_and_plans_do_not_change_the_bundle_id(bundle):
    opened = Bundle.open(bundle)
    before = opened.manifest.bundle_id
    opened.add_schedule(small_schedule("another"))
    assert opened.manifest.bundle_id == before
    assert "another" in Bundle.open(bundle).schedule_names()


def test_unknown_schedule_lists_the_known(bundle):
    with pytest.raises(BundleError, match=r"b10.*b6.*bake"):
        Bundle.open(bundle).schedule("b11")


@pytest.mark.parametrize("name", ["../outside", "a/b", ".hidden"])
def test_a_schedule_cannot_be_written_outside_its_folder(bundle, name):
    with pytest.raises(ScheduleError, match="plain file name"):
        Bundle.open(bundle).add_schedule(small_schedule(name))


def test_concurrent_additions_are_all_kept(bundle):
    opened = [Bundle.open(bundle) for _ in range(8)]
    threads = [
        threading.Thread(target=one.add_schedule, args=(small_schedule(f"s{index}"),))
        for index, one in enumerate(opened)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"s{index}" for index in range(8)} <= set(Bundle.open(bundle).schedule_names())


def test_a_bundle_opens_while_its_schedules_are_replaced(bundle):
    is_done = threading.Event()

    def replace_again_and_again() -> None:
        opened = Bundle.open(bundle)
        for count in range(40):
            opened.add_schedule(bake("euler", make_grid(4 + count), [0, 2], name="b10"))
        is_done.set()

    writer = threading.Thread(target=replace_again_and_again)
    writer.start()
    while not is_done.is_set():
        assert "b10" in Bundle.open(bundle).manifest.additions["schedules/b10"].path
    writer.join()


def test_something_else_at_the_output_path_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="is no bundle; nothing was changed"):
        create_bundle(tmp_path, lambda _: pytest.fail("must not build"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_build_leaves_nothing_and_keeps_the_old_bundle(bundle):
    before = sorted(path.name for path in bundle.parent.iterdir())
    bundle_id = Bundle.open(bundle).manifest.bundle_id

    def fail(directory: Path) -> object:
        (directory / "half.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_bundle(bundle, fail, {})
    assert sorted(path.name for path in bundle.parent.iterdir()) == before
    assert Bundle.open(bundle).manifest.bundle_id == bundle_id


def test_a_full_disk_while_adding_a_schedule_leaves_the_bundle_as_it_was(bundle):
    script = "import sys; from tests.test_bundle import small_schedule, limited_add; limited_add()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "BUNDLE": str(bundle), "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "File too large" in done.stdout
    assert not list((bundle / "schedules").glob("*big*"))
    assert "big" not in Bundle.open(bundle).schedule_names()


def limited_add() -> None:
    """Run in a process of its own: files cannot grow, as on a full disk."""
    opened = Bundle.open(os.environ["BUNDLE"])
    import signal  # noqa: PLC0415

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    try:
        opened.add_schedule(small_schedule("big"))
    except InputError as error:
        print(error)
        sys.exit(3)


def test_a_failed_manifest_leaves_the_bundle_as_it_was(bundle, monkeypatch):
    opened = Bundle.open(bundle)
    before = sorted(path.name for path in (bundle / "schedules").iterdir())

    def fail(*_: object) -> None:
        raise InputError("no space")

    monkeypatch.setattr("meancache_trt.bundle.write_json", fail)
    with pytest.raises(InputError, match="no space"):
        opened.add_schedule(small_schedule("b10"))
    assert sorted(path.name for path in (bundle / "schedules").iterdir()) == before
    assert Bundle.open(bundle).schedule("b10").budget == 10


def test_a_replaced_schedule_leaves_one_file(bundle):
    Bundle.open(bundle).add_schedule(small_schedule("b10"))
    assert len(list((bundle / "schedules").glob("b10.*"))) == 1
    assert Bundle.open(bundle).schedule("b10").budget == 2


def test_a_failed_replacement_puts_the_old_bundle_back(bundle, monkeypatch):
    bundle_id = Bundle.open(bundle).manifest.bundle_id
    exported = Bundle.open(bundle).export
    rename = Path.rename

    def fail_into_place(self: Path, target: Path) -> Path:
        if ".building-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(InputError, match="cannot write"):
        create_bundle(bundle, lambda _: exported, {})
    assert Bundle.open(bundle).manifest.bundle_id == bundle_id
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_parents_made_for_a_failed_bundle_go_again(tmp_path):
    def fail(_: Path) -> object:
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        create_bundle(tmp_path / "a" / "b" / "c.mcb", fail, {})
    assert list(tmp_path.iterdir()) == []


def test_a_moved_bundle_still_opens(bundle):
    moved = bundle.with_name("moved.mcb")
    shutil.move(bundle, moved)
    assert Bundle.open(moved).schedule_names()
