"""How close tables come to the recording, in pictures: what schedules are chosen by and say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.lockstep import OnEnd, chunks
from meancache_trt.calibration.metrics import psnr, require_ssim, ssim, summarize
from meancache_trt.calibration.sequential_fit import FitOptions, FittedRows, fit_rows, follow_rows
from meancache_trt.calibration.states import SampleStates, sample_states
from meancache_trt.calibration.trajectories import Array, Trajectories
from meancache_trt.calibration.velocity_field import VelocityField
from meancache_trt.meancache.evidence import Fidelity
from meancache_trt.meancache.folding import Rows, interval_widths

_NO_ERROR = 1e-9
"""Errors below this are rounding of float32, and count as this."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What a table did: its rows, and for each sample (S,) latent error, PSNR in dB and SSIM."""

    rows: Rows
    errors: Values
    psnr: Values
    ssim: Values
    evaluations: int

    @property
    def score(self) -> float:
        """What candidates are compared by: the mean PSNR and its 5th percentile count alike."""
        return float(self.psnr.mean() + np.percentile(self.psnr, 5))

    def fidelity(self) -> Fidelity:
        """The summary that a schedule file holds."""
        return Fidelity(
            psnr=summarize(self.psnr, with_interval=True),
            ssim=summarize(self.ssim, with_interval=True),
            latent_error=mean_error(self.errors),
        )


def mean_error(errors: Values) -> float:
    """Geometric mean of relative errors: what a mean over decibels compares."""
    return float(np.exp(np.log(np.maximum(errors, _NO_ERROR)).mean()))


class Judge:
    """Runs tables on the samples of a recording and compares pictures; make it by `judging`."""

    def __init__(
        self, trajectories: Trajectories, field: VelocityField, references: SampleStates
    ) -> None:
        self.trajectories, self.field = trajectories, field
        self._references = references

    def fit(self, nodes: Sequence[int], options: FitOptions) -> Outcome:
        """Fit a table; the outcome is that of samples which were held out."""
        return self._run(
            lambda on_end: fit_rows(self.trajectories, self.field, nodes, options, on_end)
        )

    def follow(self, nodes: Sequence[int], rows: Rows) -> Outcome:
        """Run a table as it is."""
        return self._run(
            lambda on_end: follow_rows(self.trajectories, self.field, nodes, rows, on_end)
        )

    def euler(self, nodes: Sequence[int]) -> Outcome:
        """Run plain Euler on some nodes."""
        widths = interval_widths(self.trajectories.grid.array(), nodes)
        return self.follow(nodes, tuple((width,) for width in widths.tolist()))

    def noise_floor(self) -> float:
        """PSNR in dB of the first sample over all steps by the field, against its recording."""
        recorded = self.trajectories
        alone = Trajectories(recorded.directory, recorded.settings, recorded.samples[:1])
        every_step = range(recorded.grid.steps)
        return float(Judge(alone, self.field, self._references).euler(every_step).psnr[0])

    def _run(self, run: Callable[[OnEnd], FittedRows]) -> Outcome:
        closeness: list[Values] = []

        def compare(samples: Sequence[int], latents: Array) -> None:
            pictures = self.field.pictures(latents)
            references = self._references.read(samples).reshape(pictures.shape)
            closeness.append(np.stack([psnr(pictures, references), ssim(pictures, references)]))

        done = run(compare)
        decibels, similarity = np.concatenate(closeness, axis=1)
        return Outcome(done.rows, done.errors, decibels, similarity, done.evaluations)


@contextlib.contextmanager
def judging(trajectories: Trajectories, field: VelocityField) -> Iterator[Judge]:
    """A judge with the recording's pictures, which lie in a file that is gone at the end."""
    require_ssim()
    with contextlib.ExitStack() as stack:
        references: SampleStates | None = None
        for chunk in chunks(len(trajectories), field.batch):
            latents = np.stack([trajectories.final(sample) for sample in chunk])
            pictures = field.pictures(latents).reshape(len(chunk), 1, -1)
            if references is None:
                references = stack.enter_context(sample_states(1, pictures.shape[-1]))
            references.write(chunk, pictures)
        assert references is not None  # a recording holds at least one sample
        yield Judge(trajectories, field, references)
