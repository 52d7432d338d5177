"""The choice of a format, and the bytes that it gives, by foreign readers."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load
from tests.media.renderings import LATENT, PICTURE, VIDEO, rendering

from meancache_trt.errors import InputError, RuntimeUnavailableError
from meancache_trt.media.formats import OutputFormat, check_formats, default_formats
from meancache_trt.rendering import Rendering
from meancache_trt.shapes import PictureSize


def eight_bit(made: Rendering) -> NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in made.images])


def frames_of(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as file:
        pictures = []
        for index in range(getattr(file, "n_frames", 1)):
            file.seek(index)
            pictures.append(np.asarray(file.convert("RGB")))
    return np.stack(pictures)


def video_of(content: bytes) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(content)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def error_rms(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    return float(np.sqrt(((found.astype(float) - expected) ** 2).mean()))


@pytest.mark.parametrize("text", ["png", "webp:100"])
@pytest.mark.parametrize("size", [PICTURE, VIDEO], ids=str)
def test_a_lossless_format_keeps_every_pixel(text, size):
    made = rendering(size)
    found = frames_of(made.encode(OutputFormat.parse(text)))
    assert np.array_equal(found, eight_bit(made))


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_a_picture_of_more_quality_is_closer_and_larger(name):
    made = rendering(PICTURE)
    low, default, high = (made.encode(OutputFormat(name, quality)) for quality in (20, None, 99))
    errors = [error_rms(frames_of(content), eight_bit(made)) for content in (low, default, high)]
    assert errors == sorted(errors, reverse=True)
    assert len(low) < len(default) < len(high)
    assert errors[1] < 3  # of 255: a smooth picture, at what both libraries call high quality


def test_an_mp4_holds_every_frame_at_its_rate():
    made = rendering(VIDEO, rate=24000 / 1001)
    content = made.encode(OutputFormat("mp4"))
    with av.open(io.BytesIO(content)) as file:
        (stream,) = file.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames) == (64, 48, 9)
        assert stream.average_rate == Fraction(24000, 1001)
        assert float(file.duration / av.time_base) == pytest.approx(9 * 1001 / 24000, abs=1e-3)
    assert video_of(content).shape == (9, 48, 64, 3)


def test_an_mp4_comes_close_and_closer_with_quality():
    made = rendering(VIDEO)
    errors = [
        error_rms(video_of(made.encode(OutputFormat("mp4", quality))), eight_bit(made))
        for quality in (10, None, 100)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 4  # of 255; what is left at CRF 1 is the halved resolution of colours


def test_the_colours_of_an_mp4_are_kept_by_a_reader_that_believes_its_tags():
    # A player that took BT.601's matrix for BT.709's would be off by 10 and more here.
    colour = np.array([200, 60, 10])
    pixels = np.broadcast_to((colour / 255).astype(np.float32), (3, 16, 16, 3))
    made = dataclasses.replace(rendering(VIDEO), pixels=pixels)
    content = made.encode(OutputFormat("mp4"))
    with av.open(io.BytesIO(content)) as file:
        context = file.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert tuple(map(int, tags)) == (1, 1, 13)
    assert np.abs(video_of(content) - colour).max() <= 3  # rounded to 219 levels and back


def test_a_webp_animation_keeps_time():
    with Image.open(io.BytesIO(rendering(VIDEO).encode(OutputFormat("webp", 100)))) as file:
        durations = []
        for index in range(file.n_frames):
            file.seek(index)
            file.load()
            durations.append(file.info["duration"])
    assert len(durations) == 9
    assert sum(durations) == 375  # nine frames of 1/24 s, in whole milliseconds


def test_latents_are_the_loops_own_and_need_no_pixels(tmp_path: Path):
    undecoded = dataclasses.replace(rendering(PICTURE), pixels=np.empty((0, 0, 3), np.float32))
    content = undecoded.encode(OutputFormat("latents"))
    tensors = load(content)
    assert list(tensors) == ["latent"]
    assert tensors["latent"].dtype == np.float32
    assert np.array_equal(tensors["latent"], LATENT)
    (tmp_path / "a.safetensors").write_bytes(content)
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert '"prompt": "a fox"' in file.metadata()["comment"]
    assert not OutputFormat("latents").needs_pixels
    assert OutputFormat("png").needs_pixels


DIGESTS = """
    import hashlib
    from meancache_trt.media.formats import OutputFormat
    from tests.media.renderings import PICTURE, VIDEO, rendering

    for name in ("png", "jpeg", "webp", "mp4", "latents"):
        made = rendering(PICTURE if name == "jpeg" else VIDEO)
        print(hashlib.sha256(made.encode(OutputFormat(name), "a")).hexdigest())
"""


def test_the_same_rendering_gives_the_same_bytes_in_every_process():
    # In processes of their own, since hashing and so the order of sets differs between them.
    runs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(DIGESTS)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0].split())) == 5


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("jpeg", VIDEO, "JPEG holds no video"),
        ("mp4", PICTURE, "this bundle makes pictures"),
        ("mp4", PictureSize(47, 64, 9), "even sizes.*64x47x9"),
        ("webp", PictureSize(64, 16384), "at most 16383 pixels"),
        ("jpeg", PictureSize(65501, 64), "at most 65500 pixels"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_rendering(text, size, message):
    with pytest.raises(InputError, match=message):
        check_formats([OutputFormat("latents"), OutputFormat.parse(text)], size)


@pytest.mark.parametrize("names", [[], ["png", "png"], ["webp", "latents", "webp:80"]])
def test_formats_are_at_least_one_and_each_once(names):
    with pytest.raises(InputError, match="at least one format, each once"):
        check_formats([OutputFormat.parse(name) for name in names], PICTURE)


@pytest.mark.parametrize(("size", "name"), [(PICTURE, "png"), (VIDEO, "mp4")])
def test_the_default_takes_what_the_bundle_makes(size, name):
    (form,) = default_formats(size)
    assert form.name == name
    check_formats(default_formats(size), size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gif", "png, jpeg, webp, mp4, latents, found 'gif'"),
        ("", "found ''"),
        ("jpeg:0", "from 1 to 100, found 0"),
        ("mp4:101", "from 1 to 100, found 101"),
        ("jpeg:", "such as png or jpeg:90"),
        ("jpeg:-5", "such as png or jpeg:90"),
        ("jpeg:٣", "such as png or jpeg:90"),
        ("png:90", "takes no quality"),
        ("latents:90", "takes no quality"),
    ],
)
def test_a_format_that_is_none_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        OutputFormat.parse(text)


WITHOUT_AV = """
    import sys
    sys.modules["av"] = None  # as if it were not installed
    from meancache_trt.errors import RuntimeUnavailableError
    from meancache_trt.media.formats import OutputFormat
    from meancache_trt.shapes import PictureSize

    OutputFormat("webp").check(PictureSize(48, 64, 9))
    try:
        OutputFormat("mp4").check(PictureSize(48, 64, 9))
    except RuntimeUnavailableError as error:
        print(error)
"""


def test_mp4_without_pyav_names_the_extra():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_AV)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "install meancache-trt[batch]" in done.stdout
    assert RuntimeUnavailableError.__name__ not in done.stderr


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".safetensors"])
def test_a_rendering_is_saved_in_the_format_of_the_suffix(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    rendering(PICTURE).save(path)
    assert path.read_bytes() == rendering(PICTURE).encode(OutputFormat.of_suffix(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"), [("a.gif", "ends in one of"), ("a", "ends in one of"), ("a.mp4", "MP4")]
)
def test_a_file_that_the_rendering_cannot_be_is_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        rendering(PICTURE).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
