"""Seconds from opening a bundle to its first picture, and peak memory, in a process of its own.

usage: first_image.py python|native BUNDLE EMBEDDINGS LIBRARY

Imports no more than rendering needs. Prints one JSON document.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from meancache_trt.conditioning import Conditioning
from meancache_trt.engine.native import NativeBundle, NativeLibrary
from meancache_trt.render import load


def _native(path: str, prompt: Conditioning, library: NativeLibrary) -> None:
    with (
        NativeBundle(path, library=library) as bundle,
        bundle.session("b10", threads=1) as session,
    ):
        session.set_conditioning(prompt.tensors)
        session.run(seeds=[0])
        session.decode_rgb()


def _python(path: str, prompt: Conditioning) -> None:
    with load(path, threads=1) as pipeline:
        _ = pipeline.render(prompt, schedule="b10")[0].image


def peak_bytes(status: str) -> int:
    """Of a process's status: `ru_maxrss` would count what its parent had when it was started."""
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    host, bundle, embeddings, library = sys.argv[1:]
    given, loaded = Conditioning.load(embeddings), NativeLibrary(library)
    start = time.perf_counter()
    if host == "native":
        _native(bundle, given, loaded)
    else:
        _python(bundle, given)
    seconds = time.perf_counter() - start
    peak = peak_bytes(Path("/proc/self/status").read_text(encoding="utf-8"))
    print(json.dumps({"open_to_first_image_s": seconds, "peak_bytes": peak}))
