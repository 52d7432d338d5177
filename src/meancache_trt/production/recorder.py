"""What is written of a batch: its files, and the rows that say so."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence

from meancache_trt.errors import RuntimeUnavailableError
from meancache_trt.media.formats import OutputFormat
from meancache_trt.production.cautions import cautions_of
from meancache_trt.production.outputs import OutputDirectory
from meancache_trt.production.results import Result, WrittenFile
from meancache_trt.production.tickets import Settings, Ticket
from meancache_trt.production.work import Failure, Pictures, reason
from meancache_trt.render import Pipeline
from meancache_trt.rendering import Rendering


class Recorder:
    """Writes the files of pictures and makes the rows of jobs. `names` are by ticket index."""

    def __init__(
        self,
        pipeline: Pipeline,
        settings: Settings,
        formats: Sequence[OutputFormat],
        names: Mapping[int, str],
        output: OutputDirectory,
    ) -> None:
        self._settings, self._formats = settings, formats
        self._names, self._output = names, output
        self._bundle_id = pipeline.bundle.manifest.bundle_id
        self._runtime = f"{pipeline.runtime.name} {pipeline.runtime.version}"

    def record(self, item: Pictures | Failure, undone: Collection[int]) -> list[Result]:
        """Write the files of those tickets whose index is in `undone`; their rows.

        A picture that a format cannot hold is a failed job, as are a JPEG's prompts without room.
        Raises `InputError` where a file cannot be written, and `RuntimeUnavailableError` where a
        library is missing.
        """
        if isinstance(item, Failure):
            is_undone = item.ticket.index in undone
            return [self._row(item.ticket, error=reason(item.error))] if is_undone else []
        return [
            self._picture(ticket, rendering, item.batch)
            for ticket, rendering in zip(item.tickets, item.renderings, strict=True)
            if ticket.index in undone
        ]

    def _picture(self, ticket: Ticket, rendering: Rendering, batch: int) -> Result:
        name = self._names[ticket.index]
        try:
            contents = [rendering.encode(form, ticket.job.id) for form in self._formats]
        except RuntimeUnavailableError:
            raise
        except Exception as error:  # the job's fault, as of a prompt too long for EXIF
            return self._row(ticket, error=reason(error))
        files = [
            self._output.write_bytes(content, name + form.suffix)
            for content, form in zip(contents, self._formats, strict=True)
        ]
        return self._row(
            ticket,
            files=tuple(files),
            batch=batch,
            loop_ms=round(rendering.loop_ms, 3),
            warnings=cautions_of(
                rendering.pixels if rendering.pixels.size else None, ticket.group.schedule
            ),
        )

    def _row(
        self,
        ticket: Ticket,
        *,
        error: str | None = None,
        files: tuple[WrittenFile, ...] = (),
        batch: int = 0,
        loop_ms: float = 0.0,
        warnings: tuple[str, ...] = (),
    ) -> Result:
        return Result(
            id=ticket.job.id,
            status="done" if error is None else "failed",
            ticket_digest=ticket.digest,
            finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            prompt=ticket.job.prompt,
            negative_prompt=ticket.negative_prompt or None,
            seed=ticket.seed,
            schedule=ticket.group.schedule.name,
            schedule_digest=ticket.schedule_digest,
            guidance_scale=ticket.guidance_scale,
            resolution=str(ticket.group.resolution.size),
            noise=self._settings.noise,
            vae_tiling=self._settings.vae_tiling,
            bundle_id=self._bundle_id,
            runtime=self._runtime,
            batch=batch,
            loop_ms=loop_ms,
            files=files,
            warnings=warnings,
            error=error,
        )
