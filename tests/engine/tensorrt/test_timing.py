"""The timing cache, with the real library, which says what it cannot read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from meancache_trt.engine.tensorrt import timing
from meancache_trt.engine.tensorrt.builder import build
from tests.engine.tensorrt.jobs import make_job, write_update


def build_with(folder: Path, cache: Path) -> list[str]:
    """What is said while a small graph is built."""
    component, profile = write_update(folder, 1)
    job = make_job(folder / component.path, folder, profile)
    said: list[str] = []
    built = build(msgspec.structs.replace(job, timing_cache=str(cache)), say=said.append)
    assert built.size_bytes == Path(job.plan).stat().st_size
    return said


def test_a_cache_that_is_not_there_is_made(tmp_path: Path) -> None:
    cache = tmp_path / "made" / "timing.cache"
    assert build_with(tmp_path, cache) == []
    assert cache.stat().st_size > 0


@pytest.mark.parametrize("content", [b"no cache", b"\x00" * 4096, b"ptrt" + b"\xff" * 300])
def test_a_damaged_cache_is_said_and_replaced(tmp_path: Path, content: bytes) -> None:
    cache, fresh = tmp_path / "timing.cache", tmp_path / "fresh.cache"
    cache.write_bytes(content)
    (said,) = build_with(tmp_path, cache)
    assert f"cannot use the timing cache {cache}" in said
    assert "Failed to deserialize" in said
    assert build_with(tmp_path, fresh) == []
    assert cache.read_bytes() == fresh.read_bytes()


def test_a_cache_that_cannot_be_kept_is_said_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (said,) = build_with(tmp_path, tmp_path / "file" / "timing.cache")[-1:]
    assert "not kept" in said


def test_caches_lie_apart_by_all_that_must_be_equal() -> None:
    paths = {
        timing.default_path(flavour, version, capability)
        for flavour in ("tensorrt", "tensorrt_rtx")
        for version in ("10.16.1", "11.1.0")
        for capability in ("8.9", "12.0")
    }
    assert len(paths) == 8


def test_tensorrt_for_rtx_keeps_no_timings(tmp_path: Path) -> None:
    """Why its plans are built without: what it writes is the same after any build."""
    first, second = tmp_path / "first.cache", tmp_path / "second.cache"
    build_with(tmp_path, first)
    component, profile = write_update(tmp_path, 8)
    job = make_job(tmp_path / component.path, tmp_path, profile)
    build(msgspec.structs.replace(job, timing_cache=str(second)))
    assert first.read_bytes() == second.read_bytes()
    assert not timing.uses_timing_cache("tensorrt_rtx")
