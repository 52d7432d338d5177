"""Tickets for tests that need no bundle."""

from __future__ import annotations

import msgspec

from meancache_trt.manifest import Resolution
from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.production.jobs import Job
from meancache_trt.production.tickets import Group, Ticket

SCHEDULE = bake("euler", make_grid(10, shift=3.0), [0, 3, 6], name="b3")


def make_ticket(
    job_id: str = "a", *, prompt: str = "a fox", index: int = 0, seed: int = 5, schedule: str = "b3"
) -> Ticket:
    resolution = Resolution(48, 64, None, {}, (16, 6, 8), (12, 64), (3, 4, 64))
    return Ticket(
        index=index,
        job=Job(id=job_id, prompt=prompt),
        seed=seed,
        negative_prompt="",
        guidance_scale=3.5,
        group=Group(msgspec.structs.replace(SCHEDULE, name=schedule), resolution),
        schedule_digest="ab" * 32,
        digest="cd" * 32,
    )
