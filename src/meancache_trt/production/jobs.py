"""A job: what one picture or video is to be made of, as a line of a job file says it."""

from __future__ import annotations

import msgspec


class Job(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One picture or video to render. What is None is the run's default, then the bundle's.

    `id` names it in files and results. `resolution` is WIDTHxHEIGHT, or WIDTHxHEIGHTxFRAMES of a
    video. `schedule` is a name in the bundle or a budget, never a path. `target_psnr` in dB asks
    instead for the bundle's smallest schedule that kept as much of the held-out samples: on
    average, or of 95 in 100 where `percentile` is 5.
    """

    id: str
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    resolution: str | None = None
    frames: int | None = None
    guidance_scale: float | None = None
    schedule: str | int | None = None
    target_psnr: float | None = None
    percentile: float | None = None
