"""What was measured when a schedule was made; part of the schedule file."""

from __future__ import annotations

import msgspec


class Summary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A metric over pictures: mean, 5th percentile (linear interpolation) and worst.

    Of an error, where less is better, the "5th percentile" is the 95th: in either case one
    picture in twenty is worse. `interval` holds the mean with 95 % confidence (bootstrap over
    pictures), or None where it was not estimated.
    """

    mean: float
    p5: float
    worst: float
    interval: tuple[float, float] | None = None


class Fidelity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How close pictures come to those of all T steps.

    `psnr` in dB and `ssim` over decoded samples. `latent_error` is the distance of final latents as
    a fraction of the recorded ones, the geometric mean over samples.
    """

    psnr: Summary
    ssim: Summary
    latent_error: float


class Stability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How alike the edge costs of different samples are.

    `variation` is the coefficient of variation over samples, median over edges. `correlation` is
    Spearman's, of one sample's costs with the mean of the others': mean over samples, and worst.
    """

    variation: float
    correlation: float
    worst_correlation: float


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A PSNR that a schedule was chosen for.

    `percentile` is that of the pictures which may be below `psnr` dB; None means that their mean
    reaches it. `confidence` is how probable it is that the target holds on further prompts, as
    estimated from the held-out samples.
    """

    psnr: float
    percentile: float | None
    confidence: float


class Evidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured when the schedule was made. None means that it was not measured.

    `edge_costs` has one entry for each interval (B), measured as `cost` says; `path_cost` is the
    sum of their powers `gamma`. `seconds` and `network_evaluations` include the recording;
    `candidates` are tables that were compared on all samples, Euler's among them; equal ones
    were run once. `fidelity` is that of the schedule on the
    calibration samples, of a fitted table each sample with rows that were fitted without it;
    `euler` that of plain Euler on the same nodes. `noise_floor` is the PSNR in dB of all T steps by
    the network that the schedule was calibrated with, against the recording: what is closer than
    this cannot be told apart.
    """

    samples: int
    seconds: float
    network_evaluations: int | None = None
    candidates: int | None = None
    cost: str | None = None
    gamma: float | None = None
    edge_costs: tuple[float, ...] | None = None
    path_cost: float | None = None
    fidelity: Fidelity | None = None
    euler: Fidelity | None = None
    noise_floor: float | None = None
    stability: Stability | None = None
    target: Target | None = None

    @property
    def is_worse_than_euler(self) -> bool:
        """Whether plain Euler on the same nodes comes closer on average, in what can be told."""
        if self.fidelity is None or self.euler is None:
            return False
        floor = self.noise_floor or 100.0
        return self.fidelity.psnr.mean < min(self.euler.psnr.mean, floor)
