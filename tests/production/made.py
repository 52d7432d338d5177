"""Tickets and results that no bundle made, for the tests of a run's bookkeeping."""

from __future__ import annotations

from pathlib import Path

from meancache_trt.manifest import Resolution
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.production.jobs import Job
from meancache_trt.production.results import Result, Status
from meancache_trt.production.run_folder import RunRecord
from meancache_trt.production.tickets import Group, Ticket

GRID = make_grid(20, shift=3.0)
B5 = bake("official", GRID, (0, 1, 3, 7, 14), (1, 2, 3, 4), name="b5")
FULL = bake("euler", GRID, range(20), name="full")

RUN = RunRecord(
    bundle_id="b" * 64,
    runtime="onnxruntime",
    runtime_version="1.22.0",
    precision="float32",
    noise="philox",
    vae_tiling=False,
    formats=("png",),
    name_template="{id}",
)


def make_resolution(width: int, height: int) -> Resolution:
    return Resolution(
        height=height,
        width=width,
        frames=None,
        symbols={"image_tokens": height * width // 256},
        noise_shape=(16, height // 8, width // 8),
        latent_shape=(height * width // 256, 64),
        decode_shape=(height // 16, width // 16, 64),
    )


def make_ticket(
    index: int = 0,
    *,
    job_id: str | None = None,
    prompt: str = "a lake",
    seed: int = 0,
    guidance_scale: float | None = 3.5,
    schedule: Schedule = B5,
    size: tuple[int, int] = (64, 64),
    negative_prompt: str = "",
    schedule_digest: str | None = None,
    bundle_id: str = RUN.bundle_id,
) -> Ticket:
    schedule_digest = schedule_digest or digest_of(schedule.name.encode())
    content = (prompt, seed, guidance_scale, schedule_digest, size, negative_prompt, bundle_id)
    return Ticket(
        index=index,
        job=Job(id=f"job{index}" if job_id is None else job_id, prompt=prompt),
        seed=seed,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        group=Group(schedule, make_resolution(*size)),
        schedule_digest=schedule_digest,
        digest=digest_of(repr(content).encode()),
    )


def make_result(ticket: Ticket, status: Status = "done", error: str | None = None) -> Result:
    return Result(
        id=ticket.job.id,
        status=status,
        ticket_digest=ticket.digest,
        finished_at="2026-01-02T03:04:05Z",
        prompt=ticket.job.prompt,
        negative_prompt=ticket.negative_prompt or None,
        seed=ticket.seed,
        schedule=ticket.group.schedule.name,
        schedule_digest=ticket.schedule_digest,
        guidance_scale=ticket.guidance_scale,
        resolution=str(ticket.group.resolution.size),
        noise="philox",
        bundle_id=RUN.bundle_id,
        runtime="onnxruntime",
        error=error,
    )


def entries_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
