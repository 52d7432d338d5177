"""Float32 vectors of many samples in a temporary file: memory does not grow with the samples."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from meancache_trt.calibration.trajectories import Array
from meancache_trt.errors import CalibrationError


class SampleStates:
    """`slots` vectors of `size` values for each sample; a sample is read and written whole."""

    def __init__(self, file: BinaryIO, slots: int, size: int) -> None:
        self._file = file
        self._shape = slots, size

    def read(self, samples: Sequence[int]) -> Array:
        """Shape (n, slots, size). Samples that were never written are not to be read."""
        states = np.empty((len(samples), *self._shape), np.float32)
        for state, sample in zip(states, samples, strict=True):
            self._file.seek(sample * state.nbytes)
            state[...] = np.frombuffer(self._file.read(state.nbytes), np.float32).reshape(
                self._shape
            )
        return states

    def write(self, samples: Sequence[int], states: Array) -> None:
        """Keep `states` (n, slots, size), float32. Raises `CalibrationError` on a full disk."""
        for state, sample in zip(states, samples, strict=True):
            self._file.seek(sample * state.nbytes)
            try:
                self._file.write(np.ascontiguousarray(state).data)
            except OSError as error:
                raise CalibrationError(
                    f"expected room for {state.nbytes} bytes a sample in {tempfile.gettempdir()}, "
                    f"found: {error}; set TMPDIR to a larger disk"
                ) from error


@contextlib.contextmanager
def sample_states(slots: int, size: int) -> Iterator[SampleStates]:
    """States in a file that is gone at the end of the `with`."""
    with tempfile.TemporaryFile() as file:
        yield SampleStates(file, slots, size)
