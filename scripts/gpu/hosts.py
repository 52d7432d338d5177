"""Memory, streams and lanes, as a host that has torch of its own uses them."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scripts.gpu import bounds
from scripts.gpu.bench import Pair
from scripts.gpu.bounds import largest_difference
from scripts.gpu.record import Check, equal, skipped

from meancache_trt.engine.select import open_runtime
from meancache_trt.session import Graphs, Session

_NO_TORCH = "torch is not installed"


def back_to_back(pair: Pair, sessions: Sequence[Session]) -> list[NDArray[np.float32]]:
    """Latents of the sessions' loops from the first requests, all enqueued before one is waited for.

    Each session has rendered its request before, so that its inputs are in place.
    """
    runtime = pair.tested.runtime
    for session, request in zip(sessions, pair.requests, strict=False):
        start = request.noise.astype(np.float32)
        del start
        session.loop.run()
    runtime.synchronize()
    return [session.loop.result() for session in sessions]
