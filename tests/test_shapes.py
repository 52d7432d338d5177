from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meancache_trt.errors import InputError
from meancache_trt.shapes import ONE, PictureSize, Range, Ranges, text_buckets


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1280x720", PictureSize(720, 1280)),
        ("1280x720x129", PictureSize(720, 1280, 129)),
        (" 64x8 ", PictureSize(8, 64)),
    ],
)
def test_a_resolution_is_read_width_first_and_written_the_same_way(
    text: str, size: PictureSize
) -> None:
    assert PictureSize.parse(text) == size
    assert str(size) == text.strip()


@pytest.mark.parametrize("text", ["", "64", "64x", "x64", "64×64", "64x64x", "-64x64", "6.4x64"])
def test_what_is_no_resolution_is_told_how_one_is_written(text: str) -> None:
    with pytest.raises(InputError, match=r"WIDTHxHEIGHT, such as 1280x720,.* found") as failure:
        PictureSize.parse(text)
    assert repr(text) in str(failure.value)


@pytest.mark.parametrize(
    ("text", "ends"), [("1/2/4", (1, 2, 4)), ("2", (2, 2, 2)), ("3/3/8", (3, 3, 8))]
)
def test_a_range_is_three_numbers_or_one(text: str, ends: tuple[int, int, int]) -> None:
    found = Range.parse(text)
    assert found.ends == ends == (found.min, found.opt, found.max)
    assert str(found) == "/".join(map(str, ends))


@pytest.mark.parametrize("text", ["", "1/2", "1/2/3/4", "a", "1//4", "-1/1/1", "1/2/x", "1,2,4"])
def test_what_is_no_range_is_told_how_one_is_written(text: str) -> None:
    with pytest.raises(InputError, match=r"MIN/OPT/MAX, such as 1/2/4.* found") as failure:
        Range.parse(text)
    assert repr(text) in str(failure.value)


@pytest.mark.parametrize("text", ["4/2/8", "1/8/4", "0/1/2", "0"])
def test_a_range_ascends_from_one(text: str) -> None:
    with pytest.raises(InputError, match="ascending and at least 1") as failure:
        Range.parse(text)
    assert f"found {text}" in str(failure.value)


def test_ranges_cover_every_size_and_usually_mean_the_first() -> None:
    sizes = [PictureSize(64, 48, 5), PictureSize(32, 96, 9), PictureSize(128, 16, 1)]
    assert Ranges.covering(sizes, text_tokens=7, batch=Range(1, 2, 4)) == Ranges(
        batch=Range(1, 2, 4),
        height=Range(32, 64, 128),
        width=Range(16, 48, 96),
        frames=Range(1, 5, 9),
        text_tokens=Range(7, 7, 7),
    )


def test_pictures_have_no_range_of_frames() -> None:
    assert Ranges.covering([PictureSize(8, 8)], text_tokens=1, batch=ONE).frames is None


def test_a_range_is_checked_where_a_file_is_read() -> None:
    assert msgspec.json.decode(b'{"min":1,"opt":2,"max":3}', type=Range) == Range(1, 2, 3)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"min":1,"opt":2,"max":3,"step":1}', type=Range)


@pytest.mark.parametrize(
    ("text_tokens", "buckets"),
    [
        (1024, (128, 256, 512, 1024)),
        (512, (64, 128, 256, 512)),  # Qwen-Image
        (256, (32, 64, 128, 256)),  # HunyuanVideo
        (300, (40, 80, 152, 300)),
        (32, (8, 16, 32)),  # the stand-ins
        (12, (8, 12)),
        (8, (8,)),
        (1, (1,)),
    ],
)
def test_prompts_are_padded_to_a_few_lengths(text_tokens: int, buckets: tuple[int, ...]) -> None:
    assert text_buckets(text_tokens) == buckets


@given(st.integers(1, 4096), st.data())
def test_every_prompt_has_a_length_that_wastes_little(
    text_tokens: int, data: st.DataObject
) -> None:
    buckets = text_buckets(text_tokens)
    assert len(buckets) <= 4
    assert buckets[-1] == text_tokens
    assert list(buckets) == sorted(set(buckets))
    assert all(length % 8 == 0 for length in buckets[:-1])
    used = data.draw(st.integers(0, text_tokens))
    found = min(length for length in buckets if length >= used)
    assert found < max(2 * used, text_tokens / 8) + 16  # 8 of rounding at either end of a bucket
