"""The results log: one line of JSON for each job that was done or has failed."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["done", "failed"]


class WrittenFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of a job: its path relative to the output directory, size and SHA-256."""

    path: str
    size_bytes: int
    sha256: str


class Result(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What became of a job.

    `ticket_digest` is `Ticket.digest`. `finished_at` is UTC in ISO 8601. `loop_ms` is the denoising
    loop of the whole `batch`. `warnings` say what may be wrong with a picture that was made;
    `error` is why a failed job has none.
    """

    id: str
    status: Status
    ticket_digest: str
    finished_at: str
    prompt: str
    negative_prompt: str | None = None
    seed: int
    schedule: str
    schedule_digest: str
    guidance_scale: float | None = None
    resolution: str
    noise: str
    vae_tiling: bool = False
    bundle_id: str
    runtime: str
    batch: int = 0
    loop_ms: float = 0.0
    files: tuple[WrittenFile, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str | None = None
