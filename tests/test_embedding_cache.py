from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from meancache_trt.embedding_cache import EmbeddingCache, RecentEmbeddings, open_cache

ENTRY_BYTES = 1 << 12


def key(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def tensors(value: float = 1.0) -> dict[str, np.ndarray]:
    features = np.full((1, ENTRY_BYTES // 4), value, np.float32)
    return {"features": features, "mask": np.array([[True, False]])}


def keys_in(directory: Path) -> set[str]:
    return {path.stem for path in directory.iterdir()}


def same(found: dict[str, Any] | None, expected: dict[str, np.ndarray]) -> bool:
    return found is not None and all(
        np.array_equal(found[name], value) and found[name].dtype == value.dtype
        for name, value in expected.items()
    )


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "deep" / "embeddings")


def test_what_was_kept_is_found_again_by_its_key_alone(cache):
    assert cache.get(key("a")) is None
    cache.put(key("a"), tensors())
    assert same(EmbeddingCache(cache.directory).get(key("a")), tensors())
    assert cache.get(key("b")) is None


def test_a_later_entry_replaces_the_earlier(cache):
    cache.put(key("a"), tensors(1))
    cache.put(key("a"), tensors(2))
    assert same(cache.get(key("a")), tensors(2))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "one bit":
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "another entry's file":
        save_file(load_file(path), path)
    elif how == "a directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content[: {"empty": 0, "header": 20, "half": len(content) // 2}[how]])


@pytest.mark.parametrize(
    "how", ["one bit", "empty", "header", "half", "another entry's file", "a directory"]
)
def test_a_damaged_entry_is_a_miss(cache, how):
    cache.put(key("a"), tensors())
    (path,) = cache.directory.iterdir()
    damage(path, how)
    assert cache.get(key("a")) is None


def test_a_damaged_entry_is_replaced(cache):
    cache.put(key("a"), tensors())
    damage(next(cache.directory.iterdir()), "half")
    cache.put(key("a"), tensors())
    assert same(cache.get(key("a")), tensors())


def aged(cache: EmbeddingCache, *names: object) -> None:
    """Entries, the first of them the oldest."""
    for age, name in enumerate(names):
        cache.put(key(name), tensors())
        os.utime(cache.directory / f"{key(name)}.safetensors", (age + 1, age + 1))


def test_the_longest_unused_entries_go_when_there_are_too_many(tmp_path):
    cache = EmbeddingCache(tmp_path, cap_bytes=4 * ENTRY_BYTES)  # three, with their headers
    aged(cache, 0, 1, 2)
    assert cache.get(key(0)) is not None  # used now
    cache.put(key(3), tensors())
    assert keys_in(tmp_path) == {key(0), key(2), key(3)}


def test_an_entry_larger_than_the_cache_is_not_kept(tmp_path):
    cache = EmbeddingCache(tmp_path, cap_bytes=ENTRY_BYTES // 2)
    cache.put(key(0), tensors())
    assert keys_in(tmp_path) == set()


def test_files_that_are_not_ours_are_never_removed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"w" * 10 * ENTRY_BYTES)
    (tmp_path / "notes").mkdir()
    cache = EmbeddingCache(tmp_path, cap_bytes=2 * ENTRY_BYTES)
    aged(cache, 0, 1, 2)
    assert {"model", "notes"} < keys_in(tmp_path)
    assert len(keys_in(tmp_path)) == 3


def test_what_a_killed_process_left_unfinished_goes_first(tmp_path):
    left = tmp_path / f".{key(0)}.safetensors.abc123.safetensors"
    left.write_bytes(b"h" * ENTRY_BYTES)
    os.utime(left, (1, 1))
    cache = EmbeddingCache(tmp_path, cap_bytes=2 * ENTRY_BYTES)
    cache.put(key(1), tensors())
    assert keys_in(tmp_path) == {key(1)}


def test_a_directory_that_cannot_be_made_keeps_nothing_and_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = EmbeddingCache(tmp_path / "file" / "embeddings")
    cache.put(key(0), tensors())
    assert cache.get(key(0)) is None


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_directory_that_cannot_be_written_keeps_nothing_and_is_no_error(cache, monkeypatch, code):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    cache.put(key(0), tensors())
    with monkeypatch.context() as patch:
        patch.setattr("meancache_trt.meancache.files.save_file", refuse)
        patch.setattr(os, "utime", refuse)
        cache.put(key(1), tensors())
        assert same(cache.get(key(0)), tensors())
    assert keys_in(cache.directory) == {key(0)}


def put_and_get(directory: Path, turns: int) -> None:
    """In a process of its own: entries that the others write and remove as well."""
    cache = EmbeddingCache(directory, cap_bytes=4 * ENTRY_BYTES)
    for turn in range(turns):
        name = turn % 6
        cache.put(key(name), tensors(name))
        found = cache.get(key(name))
        assert found is None or same(found, tensors(name))


def test_processes_may_write_and_remove_the_same_entries_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=put_and_get, args=(tmp_path, 40)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert keys_in(tmp_path) <= {key(name) for name in range(6)}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * ENTRY_BYTES


def test_the_cache_lies_in_the_users_cache_directory_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default, chosen = open_cache(None), open_cache(tmp_path / "mine")
    assert default is not None
    assert default.directory == tmp_path / "meancache-trt" / "embeddings"
    assert chosen is not None
    assert chosen.directory == tmp_path / "mine"
    assert open_cache("off") is None


def test_memory_keeps_the_last_used_up_to_its_cap():
    entry = tensors()
    recent = RecentEmbeddings(2 * sum(tensor.nbytes for tensor in entry.values()))
    recent.put("a", entry)
    recent.put("b", tensors(2))
    assert recent.get("a") is entry
    recent.put("c", tensors(3))
    assert recent.get("b") is None
    assert recent.get("a") is entry


def test_memory_keeps_nothing_that_is_larger_than_its_cap():
    recent = RecentEmbeddings(1)
    recent.put("a", tensors())
    assert recent.get("a") is None
