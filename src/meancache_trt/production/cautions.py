"""What may be wrong with a picture that was made, as far as pixels and schedule can tell."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.schedule import Schedule

FLAT_DEVIATION = 2 / 255
"""Two 8-bit levels, which an eye hardly tells from none. Pictures of the three stand-ins have 0.06
and more, at 1 to 10 evaluations."""

CLIPPED_SHARE = 0.5
"""Of pixels that are at the end of some channel. Pictures of the stand-ins have up to 0.03 at 10
evaluations, and 0.34 at 1, where they are mere shapes. A picture on white ground may have as much
on purpose: it is a caution, not an error."""

LOWEST_PSNR = 20.0
"""In dB, where the error is a tenth of the whole range (root of the mean square): what is so far
from the picture of all steps is another picture."""


def cautions_of(pixels: NDArray[np.float32] | None, schedule: Schedule) -> tuple[str, ...]:
    """Sentences for the results log; none for an ordinary picture by a calibrated schedule.

    `pixels` are (H, W, 3) in [0, 1], or (frames, H, W, 3); None where only latents were made.
    """
    seen = () if pixels is None else _of_pixels(pixels)
    return (*seen, *_of_schedule(schedule))


def _of_pixels(pixels: NDArray[np.float32]) -> Iterator[str]:
    frames = pixels.reshape(-1, *pixels.shape[-3:])
    if _deviation(frames) < FLAT_DEVIATION:
        yield "the picture is of a single colour"
        return
    clipped = [((frame <= 0) | (frame >= 1)).any(axis=-1).mean() for frame in frames]
    share = float(np.mean(clipped))
    if share > CLIPPED_SHARE:
        yield (
            f"{share:.0%} of the pixels are clipped in some channel; of an ordinary picture it is "
            f"less than {CLIPPED_SHARE:.0%}"
        )


def _deviation(frames: NDArray[np.float32]) -> float:
    """Standard deviation of the channel that varies most; frame by frame, to spare memory."""
    means = [frame.mean(axis=(0, 1), dtype=np.float64) for frame in frames]
    squares = [np.square(frame, dtype=np.float64).mean(axis=(0, 1)) for frame in frames]
    variance = np.mean(squares, axis=0) - np.mean(means, axis=0) ** 2
    return float(np.sqrt(variance.max().clip(0)))


def _of_schedule(schedule: Schedule) -> Iterator[str]:
    if schedule.budget == schedule.grid.steps and schedule.history == 1:
        return  # plain Euler at every step: there is no other picture to be far from
    evidence = schedule.calibration
    if evidence is None or evidence.fidelity is None:
        yield (
            f"schedule {schedule.name!r} has no calibration: how close it comes to all "
            f"{schedule.grid.steps} steps is not known"
        )
        return
    psnr = evidence.fidelity.psnr.p5
    if psnr < LOWEST_PSNR:
        yield (
            f"schedule {schedule.name!r} left one calibration sample in twenty below {psnr:.1f} "
            f"dB, less than {LOWEST_PSNR:g} dB: such a picture is another than that of all steps"
        )
    if evidence.is_worse_than_euler:
        yield f"plain Euler on the nodes of schedule {schedule.name!r} comes closer to all steps"
