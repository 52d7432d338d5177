from __future__ import annotations

from scripts.production.fuzz_http import quick_bundle, run

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


def contents(bundle):
    return {path: sha256_of(path) for path in bundle.rglob("*") if path.is_file()}
