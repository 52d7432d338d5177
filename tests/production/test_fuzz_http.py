from __future__ import annotations

from scripts.production.fuzz_http import noting_writes, quick_bundle, run

from meancache_trt.meancache.hashing import sha256_of

REQUESTS = 150


def test_fuzzed_requests_get_the_answers_that_the_openapi_promises(bundle, tmp_path, monkeypatch):
    quick_bundle(bundle)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = contents(bundle)
    outcome = run(bundle, REQUESTS, seed=1)
    assert outcome.statuses.total() > REQUESTS
    assert {200, 400, 401, 404, 405, 408, 413, 415} <= set(outcome.statuses)
    assert max(set(outcome.statuses) - {503, 504}) < 500
    assert outcome.written == []
    assert contents(bundle) == before


def test_a_write_is_noted_and_a_reading_is_not(tmp_path):
    written = []
    with noting_writes(written):
        (tmp_path / "new").write_text("a")
        (tmp_path / "new").read_text()
        (tmp_path / "new").rename(tmp_path / "old")
        (tmp_path / "folder").mkdir()
    (tmp_path / "after").write_text("a")
    assert written == [
        f"open {tmp_path / 'new'}",
        f"os.rename {tmp_path / 'new'}",
        f"os.mkdir {tmp_path / 'folder'}",
    ]


def contents(bundle):
    return {path: sha256_of(path) for path in bundle.rglob("*") if path.is_file()}
