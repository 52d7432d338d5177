from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from meancache_trt.media.formats import OutputFormat

PROMPT, SEED, SCHEDULE = "large plain red circle", 7, "b6"
TOKEN = "0123456789abcdef"
END_S = 300

_SERVE = """
import json, socket, sys
from pathlib import Path

import ray

from meancache_trt.production.hosting import Hosting, listen
from meancache_trt.production.ray_serve import served
from tests.production.serving import Client

folder, bundle, token, fields = sys.argv[1:]
ray.init(
    num_cpus=2,
    num_gpus=0,
    include_dashboard=False,
    object_store_memory=100 << 20,
    _temp_dir=folder,
    log_to_driver=False,
)
with listen("127.0.0.1", 0) as free:
    port = free.getsockname()[1]
hosting = Hosting(bundle=Path(bundle), threads=1, embedding_cache="off", token=token)
with served(hosting, host="127.0.0.1", port=port):
    found = Client(port, token).generate(**json.loads(fields))
    stranger = Client(port).generate(**json.loads(fields))
    malformed = Client(port, token).generate(n=0)
print(json.dumps([found.json, stranger.status, malformed.status, ray.is_initialized()]))
"""
"""In a process of its own: Ray leaves threads behind, and warnings that are none of ours."""


@pytest.mark.slow
def test_a_ray_replica_makes_the_pictures_of_the_pipeline_and_all_of_it_ends(
    shared_bundle, pipeline
):
    fields = {"prompt": PROMPT, "seed": SEED, "schedule": SCHEDULE}
    with tempfile.TemporaryDirectory(prefix="r") as folder:  # short: Ray's sockets lie below it
        done = subprocess.run(
            [sys.executable, "-c", _SERVE, folder, str(shared_bundle), TOKEN, json.dumps(fields)],
            capture_output=True,
            text=True,
            check=False,
            timeout=END_S,
            cwd=Path(__file__).parents[2],
        )
    assert done.returncode == 0, done.stderr
    found, stranger, malformed, is_running = json.loads(done.stdout.splitlines()[-1])
    assert (stranger, malformed, is_running) == (401, 400, False)
    (expected,) = pipeline.render([PROMPT], seed=SEED, schedule=SCHEDULE)
    content = base64.b64decode(found["data"][0]["b64_json"])
    assert content == expected.encode(OutputFormat("png"))
