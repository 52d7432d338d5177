"""Jobs that were checked against a bundle: everything that decides how they are rendered."""

from __future__ import annotations

from dataclasses import dataclass

from meancache_trt.manifest import Resolution
from meancache_trt.meancache.schedule import Schedule
from meancache_trt.production.jobs import Job
from meancache_trt.rendering import NoiseSource


@dataclass(frozen=True)
class Settings:
    """What all pictures of a run or service share."""

    noise: NoiseSource = "philox"
    vae_tiling: bool = False


@dataclass(frozen=True)
class Group:
    """What jobs share that can be one batch: a schedule at a size. Guidance scales may differ."""

    schedule: Schedule
    resolution: Resolution


@dataclass(frozen=True)
class Ticket:
    """A job whose defaults were filled in and which can be rendered.

    `index` is its place in the job file. `digest` is the SHA-256 of everything that its pixels
    follow from: all of the job but its id, the schedule's digest, the bundle's id, the settings.
    """

    index: int
    job: Job
    seed: int
    negative_prompt: str
    guidance_scale: float | None
    group: Group
    schedule_digest: str
    digest: str
