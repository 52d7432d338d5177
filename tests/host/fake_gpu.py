"""Render with the TensorRT backend where driver and TensorRT are our own; prints JSON.

In a process of its own, since the driver is found by LD_LIBRARY_PATH.

usage: python -m tests.host.fake_gpu LIBRARY BUNDLE PROMPT
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p

import numpy as np
from numpy.typing import NDArray

from meancache_trt.conditioning import Conditioning
from meancache_trt.engine import native_abi as abi
from meancache_trt.engine.native import NativeBundle, NativeLibrary, NativeSession
from meancache_trt.errors import InputError, MeanCacheError

THREADS = 4
DEVICE = 1  # MCT_DEVICE

Latent = NDArray[np.float32]


class Stopped(Exception):  # noqa: N818  a request, not an error
    pass


class FakeDriver:
    """What the driver of fake_cuda.cpp noted."""

    def __init__(self) -> None:
        self._functions = ctypes.CDLL("libcuda.so.1")
        self._functions.fake_log.restype = c_char_p

    def log(self) -> str:
        """What ran since the last call, without copies and the order between pieces of work."""
        text: bytes = self._functions.fake_log()
        words = [word for word in text.decode().split() if word.startswith(("run", "launch"))]
        self._functions.fake_forget()
        return " ".join(words)

    def live(self, kind: str | None) -> int:
        return int(self._functions.fake_live(kind.encode() if kind else None))

    def stream(self) -> int:
        """A stream of the host's own, made in the GPU's context."""
        context, stream = c_void_p(), c_void_p()
        self._functions.cuDevicePrimaryCtxRetain(byref(context), 0)
        self._functions.cuCtxPushCurrent_v2(context)
        assert self._functions.cuStreamCreate(byref(stream), c_int(0)) == 0
        self._functions.cuCtxPopCurrent_v2(byref(context))
        self._functions.cuDevicePrimaryCtxRelease_v2(0)
        assert stream.value
        return stream.value


def enqueue_on(session: NativeSession, stream: int, noise: Latent) -> Latent:
    """Noise from device memory and the latent to it, on a stream of the host's own."""
    latent = np.empty(session.latent_shape, np.float32)
    options = abi.RunOptions(
        noise=noise.ctypes.data, noise_count=noise.size, noise_memory=DEVICE, stream=stream
    )
    call = session.library.call
    call("mct_session_enqueue", session._handle, byref(options))
    data, count = latent.ctypes.data_as(c_void_p), c_size_t(latent.size)
    call("mct_session_read_latent", session._handle, data, count, DEVICE)
    call("mct_session_wait", session._handle)
    return latent


def error_of(work: Callable[[], object], kind: type[MeanCacheError]) -> str:
    try:
        work()
    except kind as error:
        return str(error)
    return ""


def cancelled(session: NativeSession) -> None:
    def stop(done: int, _budget: int) -> None:
        if done == 2:
            raise Stopped

    try:
        session.run(seeds=[1], on_evaluation=stop)
    except Stopped:
        return
    raise AssertionError


def report(bundle: NativeBundle, prompt: Conditioning) -> dict[str, object]:
    """All that is done with one bundle; its sessions are closed."""
    driver = FakeDriver()

    def opened(backend: str | None) -> NativeSession:
        session = bundle.session("b6", backend=backend, threads=1)
        session.set_conditioning(prompt.tensors)
        return session

    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    with opened("openvino") as session:
        noise = np.resize(noise, session.noise_shape)
        expected, pixels = session.run(noise), session.decode()
    said: dict[str, object] = {}
    with opened(None) as session:
        said["backend"] = session.info["backend"]
        driver.log()
        runs, logs = [], []
        for _ in range(3):
            runs.append(session.run(noise))
            logs.append(driver.log())
        said["logs"] = logs
        said["differences"] = [float(np.abs(run - expected).max()) for run in runs]
        said["pixels"] = float(np.abs(session.decode() - pixels).max())
        cancelled(session)
        driver.log()
        session.run(noise, on_evaluation=lambda _done, _budget: None)
        session.run(noise, on_evaluation=lambda _done, _budget: None)
        said["with_callback"] = driver.log()
        stream = driver.stream()
        said["on_stream"] = float(np.abs(enqueue_on(session, stream, noise) - expected).max())
        said["default_stream"] = error_of(lambda: enqueue_on(session, 1, noise), InputError)
        # A session at another size of batch moves the block that all share.
        with bundle.session("b6", backend=None, batch=3) as other:
            other.set_conditioning({k: np.repeat(v, 3, 0) for k, v in prompt.tensors.items()})
            other.run(seeds=[1, 2, 3])
        said["after_other"] = float(np.abs(session.run(noise) - expected).max())
    said["threads"] = in_threads(opened, noise, expected)
    said["left"] = {kind: driver.live(kind) for kind in ("memory", "graph", "executable")}
    return said


def in_threads(opened: Callable[[str | None], NativeSession], noise: Latent, good: Latent) -> float:
    """The largest difference of sessions that run side by side, twice each."""

    def run(_index: int) -> float:
        with opened(None) as session:
            return max(float(np.abs(session.run(noise) - good).max()) for _ in range(2))

    with ThreadPoolExecutor(THREADS) as pool:
        return max(pool.map(run, range(THREADS)))


def main() -> None:
    library, path, prompt = sys.argv[1:]
    with NativeBundle(path, library=NativeLibrary(library)) as bundle:
        print(json.dumps(report(bundle, Conditioning.load(prompt))))


if __name__ == "__main__":
    main()
