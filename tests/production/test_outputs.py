"""Files in the output directory: whole, described truly, and nowhere else."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meancache_trt.errors import InputError
from meancache_trt.media.formats import OutputFormat
from meancache_trt.media.metadata import read_metadata
from meancache_trt.production.outputs import OutputDirectory
from tests.media.renderings import PICTURE, VIDEO, rendering

PNG = OutputFormat("png")


@pytest.fixture
def output(tmp_path: Path) -> OutputDirectory:
    temporary = tmp_path / "out" / ".meancache" / "tmp-1"
    temporary.mkdir(parents=True)
    return OutputDirectory(tmp_path / "out", temporary)


def files_in(directory: Path) -> list[str]:
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()
    )


@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "mp4", "latents"])
def test_a_written_file_is_what_its_record_says(output, name):
    form = OutputFormat(name)
    made = rendering(VIDEO if name == "mp4" else PICTURE)
    record = output.write(made, form, "b10/a-1", "a")
    assert record.path == f"b10/a-1{form.suffix}"
    content = (output.directory / record.path).read_bytes()
    assert record.size_bytes == len(content)
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert read_metadata(output.directory / record.path)["id"] == "a"
    assert files_in(output.directory) == [record.path]


def test_several_formats_stand_side_by_side(output):
    made = rendering(PICTURE)
    for name in ("png", "latents"):
        output.write(made, OutputFormat(name), "a", "a")
    assert files_in(output.directory) == ["a.png", "a.safetensors"]


def test_a_file_that_was_there_is_replaced(output):
    (output.directory / "a.png").write_text("half")
    record = output.write(rendering(PICTURE), PNG, "a", "a")
    with Image.open(output.directory / record.path) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(rendering(PICTURE).image))


def test_the_longest_name_is_written(output):
    output.write(rendering(PICTURE), OutputFormat("latents"), "a" * 243, "a")
    assert files_in(output.directory) == [f"{'a' * 243}.safetensors"]


@pytest.mark.parametrize(
    "name", ["link/a", "link/deeper/a", "far/a", "loop/a", "../a", "b/../../a"]
)
def test_nothing_is_written_outside_through_links_or_dots(output, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (output.directory / "link").symlink_to(outside)
    (output.directory / "far").symlink_to(tmp_path / "not-there")
    (output.directory / "loop").symlink_to(output.directory / "loop")
    before = files_in(tmp_path)
    with pytest.raises(InputError, match=r"outside the output directory|cannot (write|create)"):
        output.write(rendering(PICTURE), PNG, name, "a")
    assert files_in(tmp_path) == before
    assert not (tmp_path / "not-there").exists()


def test_an_absolute_name_is_refused(output, tmp_path):
    with pytest.raises(InputError, match="outside the output directory"):
        output.write(rendering(PICTURE), PNG, str(tmp_path / "a"), "a")
    assert files_in(tmp_path) == []


def test_a_link_that_stays_inside_is_followed(output):
    (output.directory / "real").mkdir()
    (output.directory / "link").symlink_to("real")
    output.write(rendering(PICTURE), PNG, "link/a", "a")
    assert (output.directory / "real" / "a.png").is_file()


def test_the_output_directory_may_itself_be_a_link(output, tmp_path):
    (tmp_path / "alias").symlink_to(output.directory)
    linked = OutputDirectory(tmp_path / "alias", output.temporary)
    linked.write(rendering(PICTURE), PNG, "b3/a", "a")
    assert files_in(output.directory) == ["b3/a.png"]


def test_a_link_in_a_files_place_is_replaced_and_not_followed(output, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (output.directory / "a.png").symlink_to(tmp_path / "precious")
    output.write(rendering(PICTURE), PNG, "a", "a")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (output.directory / "a.png").is_symlink()


def test_a_file_in_a_directorys_place_is_named_and_nothing_is_left(output):
    (output.directory / "b3").write_text("in the way")
    with pytest.raises(InputError, match="cannot create"):
        output.write(rendering(PICTURE), PNG, "b3/a", "a")
    assert files_in(output.directory) == ["b3"]


def test_a_temporary_directory_that_is_gone_is_an_error_and_leaves_nothing(output):
    output.temporary.rmdir()
    with pytest.raises(InputError, match="cannot write"):
        output.write(rendering(PICTURE), PNG, "b3/a", "a")
    assert not (output.directory / "b3").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only directories")
def test_a_read_only_directory_is_named_and_nothing_is_left(output):
    output.directory.chmod(0o555)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            output.write(rendering(PICTURE), PNG, "a", "a")
    finally:
        output.directory.chmod(0o755)
    assert files_in(output.directory) == []


WRITE_BEYOND_LIMIT = """
    import resource, sys
    from pathlib import Path
    from meancache_trt.errors import InputError
    from meancache_trt.media.formats import OutputFormat
    from meancache_trt.production.outputs import OutputDirectory
    from tests.media.renderings import PICTURE, VIDEO, rendering

    output = OutputDirectory(Path(sys.argv[1]), Path(sys.argv[2]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    for name in ("png", "jpeg", "webp", "mp4", "latents"):
        made = rendering(VIDEO if name == "mp4" else PICTURE)
        try:
            output.write(made, OutputFormat(name), "b3/a", "a")
        except InputError as error:
            print(error)
"""


def test_a_full_disk_leaves_nothing(output):
    """A limit of 100 bytes a file stands for the disk: the write fails half-way."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(WRITE_BEYOND_LIMIT),
            str(output.directory),
            str(output.temporary),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("File too large; nothing was left behind") == 5
    assert files_in(output.directory) == []
    assert not (output.directory / "b3").exists()
