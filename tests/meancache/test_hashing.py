from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from meancache_trt.meancache import hashing
from meancache_trt.meancache.hashing import remember_sha256, verified_sha256


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Every path whose bytes are really read; records go to a directory of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths: list[Path] = []
    original = hashing.sha256_of

    def watch(path: Path) -> str:
        paths.append(path)
        return original(path)

    monkeypatch.setattr(hashing, "sha256_of", watch)
    return paths


def test_an_unchanged_file_is_hashed_once(tmp_path, hashed):
    file = tmp_path / "weights"
    file.write_bytes(b"w" * 100)
    expected = hashlib.sha256(b"w" * 100).hexdigest()
    assert [verified_sha256(file) for _ in range(3)] == [expected] * 3
    assert len(hashed) == 1


def test_a_file_whose_digest_is_known_is_not_hashed_until_it_changes(tmp_path, hashed):
    file = tmp_path / "plan"
    file.write_bytes(b"one")
    remember_sha256(file, "the digest")
    assert verified_sha256(file) == "the digest"
    assert hashed == []
    file.write_bytes(b"another")
    assert verified_sha256(file) == hashlib.sha256(b"another").hexdigest()


def test_a_rewritten_file_is_hashed_again(tmp_path, hashed):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = verified_sha256(file)
    file.write_bytes(b"two")
    assert verified_sha256(file) != first
    assert len(hashed) == 2


def test_a_damaged_record_is_no_error(tmp_path, hashed):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = verified_sha256(file)
    for record in (tmp_path / "cache").rglob("*.json"):
        record.write_bytes(b"{")
    assert verified_sha256(file) == first
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, hashed, monkeypatch):
    (tmp_path / "blocked").write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert verified_sha256(file) == verified_sha256(file)
    assert len(hashed) == 2


def test_a_missing_file_is_an_error(tmp_path, hashed):
    with pytest.raises(FileNotFoundError):
        verified_sha256(tmp_path / "absent")
