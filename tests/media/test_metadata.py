"""What files say of their making, in every format."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import av
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.media.renderings import PICTURE, VIDEO, rendering

from meancache_trt.errors import InputError
from meancache_trt.media.formats import FormatName, OutputFormat
from meancache_trt.media.metadata import read_metadata
from meancache_trt.rendering import Rendering

NAMES: tuple[FormatName, ...] = ("png", "jpeg", "webp", "mp4", "latents")
PROMPT = 'Füchse 狐 🦊, "quoted" \\ back\nnew line\ttab'


def made_for(name: FormatName) -> Rendering:
    made = rendering(VIDEO if name == "mp4" else PICTURE)
    return dataclasses.replace(made, prompt=PROMPT, negative_prompt="", vae_tiling=True)


def written(directory: Path, name: FormatName, made: Rendering, job_id: str | None) -> Path:
    form = OutputFormat(name)
    path = directory / f"a{form.suffix}"
    path.write_bytes(made.encode(form, job_id))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_format_tells_how_it_was_made(tmp_path, name):
    path = written(tmp_path, name, made_for(name), "job-1")
    assert read_metadata(path) == {
        "prompt": PROMPT,
        "negative_prompt": "",
        "seed": "3",
        "noise": "philox",
        "schedule": "b10",
        "schedule_digest": "ab" * 32,
        "guidance_scale": "3.5",
        "bundle_id": "cd" * 32,
        "vae_tiling": "True",
        "id": "job-1",
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_there_is_not_said(tmp_path, name):
    made = dataclasses.replace(made_for(name), negative_prompt=None)
    assert not {"negative_prompt", "id"} & set(read_metadata(written(tmp_path, name, made, None)))


@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(prompt=st.text(st.characters(codec="utf-8"), max_size=300))
def test_any_prompt_survives(tmp_path, name, prompt):
    made = dataclasses.replace(made_for(name), prompt=prompt)
    assert read_metadata(written(tmp_path, name, made, "a"))["prompt"] == prompt


def test_foreign_readers_find_the_comment(tmp_path):
    for name in ("jpeg", "webp"):
        with Image.open(written(tmp_path, name, made_for(name), "a")) as picture:
            comment = picture.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"ASCII\0\0\0"
        assert comment.isascii()
        assert json.loads(comment[8:])["prompt"] == PROMPT
    with av.open(str(written(tmp_path, "mp4", made_for("mp4"), "a"))) as video:
        assert json.loads(video.metadata["comment"])["prompt"] == PROMPT
        assert "creation_time" not in video.metadata


def test_a_prompt_that_exif_has_no_room_for_is_refused():
    made = dataclasses.replace(rendering(PICTURE), prompt="a" * 65536)
    with pytest.raises(InputError, match="EXIF holds 65533 bytes"):
        made.encode(OutputFormat("jpeg"))
    assert made.encode(OutputFormat("png"))


def test_the_chunks_of_a_png_are_those_it_always_had(tmp_path):
    made = dataclasses.replace(rendering(PICTURE), negative_prompt="狐")
    made.save(tmp_path / "found.png")
    info = PngInfo()
    info.add_itxt("prompt", "a fox")
    info.add_itxt("negative_prompt", "狐")
    for key, value in {
        "seed": "3",
        "noise": "philox",
        "schedule": "b10",
        "schedule_digest": "ab" * 32,
        "guidance_scale": "3.5",
        "bundle_id": "cd" * 32,
        "vae_tiling": "False",
    }.items():
        info.add_text(key, value)
    made.image.save(tmp_path / "expected.png", pnginfo=info)
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".mp4", ".safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\nnothing else", b"\0" * 64])
def test_a_file_that_cannot_be_read_is_named(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"cannot read the metadata of .*a{suffix}"):
        read_metadata(path)


@pytest.mark.parametrize("comment", [None, b"UNICODE\0\xff\xfe", b"ASCII\0\0\0a cat", "text", b""])
def test_somebody_elses_picture_says_nothing(tmp_path, comment):
    exif = Image.Exif()
    if comment is not None:
        exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif.tobytes())
    assert read_metadata(tmp_path / "a.jpg") == {}


def test_importing_the_formats_needs_none_of_their_libraries():
    script = (
        "import sys, meancache_trt.rendering, meancache_trt.media.metadata\n"
        "assert not {'PIL', 'av', 'torch', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
