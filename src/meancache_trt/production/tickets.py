"""Jobs that were checked against a bundle: everything that decides how they are rendered."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import msgspec

from meancache_trt.errors import InputError, MeanCacheError, ScheduleError
from meancache_trt.manifest import Resolution
from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.schedule import Schedule
from meancache_trt.production.job_files import Line
from meancache_trt.production.jobs import Job, Limits, check_job, size_of
from meancache_trt.render import Pipeline
from meancache_trt.rendering import NoiseSource
from meancache_trt.selection import calibrated_size, find_schedule
from meancache_trt.shapes import PictureSize


@dataclass(frozen=True)
class Settings:
    """What all pictures of a run or service share."""

    noise: NoiseSource = "philox"
    vae_tiling: bool = False


@dataclass(frozen=True)
class Defaults:
    """What the operator gives for jobs that do not say; None is the bundle's own default.

    Unlike a job's, `schedule` may be a file. A job's `resolution` replaces `height` and `width`,
    and `frames` where it has some.
    """

    seed: int = 0
    negative_prompt: str = ""
    guidance_scale: float | None = None
    schedule: str | int | Path | Schedule | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Group:
    """What jobs share that can be one batch: a schedule at a size. Guidance scales may differ.

    Equal groups of one `Checker` are one object, and so are equal schedules.
    """

    schedule: Schedule
    resolution: Resolution

    def __hash__(self) -> int:  # a resolution's symbols are a dict, and a schedule's table is long
        return hash((self.schedule.name, self.schedule.nodes, self.resolution.size))


@dataclass(frozen=True, slots=True)
class Ticket:
    """A job whose defaults were filled in and which can be rendered.

    `index` is its place in the job file, counted from 0. `digest` is the SHA-256 of everything that
    its pixels follow from: all of the job but its id, with the defaults, the schedule's digest in
    place of what chose it, the bundle's id, the settings.
    """

    index: int
    job: Job
    seed: int
    negative_prompt: str
    guidance_scale: float | None
    group: Group
    schedule_digest: str
    digest: str


_DIGEST_VERSION = 1
"""Counted up where the same ticket would give other pixels than before."""

_COMBINATIONS = 4096
"""How many combinations of schedule, guidance scale and size are kept: about 1 MB."""

_FAULTS_SHOWN = 20

_Choice = tuple[str | int | None, float | None, float | None]
"""A job's schedule, target PSNR and percentile."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a combination of schedule, guidance scale and size comes to."""

    group: Group
    schedule_digest: str
    guidance_scale: float | None


class Checker:
    """Checks jobs against a bundle and fills in what they leave out; loads no graph.

    Each combination of schedule, guidance scale and size is resolved once. Not thread-safe, since
    `pipeline` is not. Raises `InputError` for defaults that no job could be rendered with.
    """

    def __init__(
        self, pipeline: Pipeline, settings: Settings, defaults: Defaults, limits: Limits
    ) -> None:
        self._pipeline, self._defaults, self._limits = pipeline, defaults, limits
        self._is_guided = pipeline.bundle.export.guidance.is_classifier_free
        self._schedules: dict[Schedule, tuple[Schedule, str]] = {}
        self._groups: dict[Group, Group] = {}
        self._plan = lru_cache(_COMBINATIONS)(self._resolve)
        self._named = lru_cache(_COMBINATIONS)(self._find)
        self._measured = lru_cache(_COMBINATIONS)(self._with_evidence)
        self._basis = (
            _DIGEST_VERSION,
            pipeline.bundle.manifest.bundle_id,
            settings.noise,
            settings.vae_tiling,
        )
        check_job(
            Job(
                id="defaults",
                prompt="defaults",
                seed=defaults.seed,
                negative_prompt=defaults.negative_prompt,
                guidance_scale=defaults.guidance_scale,
            ),
            limits,
        )
        pipeline.guidance(defaults.guidance_scale)
        self._check_negative_prompt(defaults.negative_prompt)

    def check(self, index: int, job: Job) -> Ticket:
        """The ticket of a job at a place in its file; its schedule is fitted to the grid.

        Prompts that the tokenizer will cut are no fault.

        Raises:
            InputError: as `check_job` does; where the model cannot take the guidance scale or a
                negative prompt; where no schedule reaches the target; for more pixels than allowed.
            BundleError: where the bundle lacks the resolution or schedule.
            ScheduleError: where the schedule is not for this model, grid or guidance scale.
        """
        check_job(job, self._limits)
        plan = self._plan(
            (job.schedule, job.target_psnr, job.percentile),
            job.guidance_scale,
            job.resolution,
            job.frames,
        )
        if isinstance(plan, MeanCacheError):
            raise _copied(plan)
        seed = self._defaults.seed if job.seed is None else job.seed
        negative_prompt = self._defaults.negative_prompt
        if job.negative_prompt is not None:
            negative_prompt = job.negative_prompt
            self._check_negative_prompt(negative_prompt)
        content = (
            *self._basis,
            plan.schedule_digest,
            str(plan.group.resolution.size),
            plan.guidance_scale,
            seed,
            negative_prompt,
            job.prompt,
        )
        return Ticket(
            index=index,
            job=job,
            seed=seed,
            negative_prompt=negative_prompt,
            guidance_scale=plan.guidance_scale,
            group=plan.group,
            schedule_digest=plan.schedule_digest,
            digest=digest_of(msgspec.json.encode(content)),
        )

    def _check_negative_prompt(self, negative_prompt: str) -> None:
        if negative_prompt and not self._is_guided:
            raise InputError(
                "this model has no classifier-free guidance, so a negative prompt would have no "
                "effect; leave it out"
            )

    def _resolve(
        self, choice: _Choice, scale: float | None, resolution: str | None, frames: int | None
    ) -> _Plan | MeanCacheError:
        """The plan of a combination, or why there is none: errors are remembered like plans."""
        given = self._defaults.guidance_scale if scale is None else scale
        wanted, target, percentile = choice
        try:
            size = self._size(resolution, frames)
            if target is None:
                found = self._named(wanted, size.size)
            else:
                found = _smallest(self._measured(given, size.size), target, percentile)
            if isinstance(found, MeanCacheError):
                return found
            schedule = self._pipeline.schedule(found, given, size)
            guidance = self._pipeline.guidance(given, schedule)
        except MeanCacheError as error:
            return _copied(error)
        if schedule not in self._schedules:
            self._schedules[schedule] = schedule, digest_of(encode_json(schedule))
        schedule, digest = self._schedules[schedule]
        group = Group(schedule, size)
        group = self._groups.setdefault(group, group)
        # The same number in the same bytes, whoever wrote it: no 4, no -0.0.
        return _Plan(group, digest, None if guidance is None else guidance + 0.0)

    def _size(self, text: str | None, frames: int | None) -> Resolution:
        height, width, count = size_of(text, frames)
        size = self._pipeline.resolution(
            height or self._defaults.height,
            width or self._defaults.width,
            count or self._defaults.frames,
        )
        pixels = size.height * size.width * (size.frames or 1)
        if pixels > self._limits.pixels:
            raise InputError(
                f"{size.size} is {pixels:,} pixels, the limit is {self._limits.pixels:,}; render "
                "smaller or raise the limit"
            )
        return size

    def _find(self, wanted: str | int | None, size: PictureSize) -> Schedule | MeanCacheError:
        """The schedule of a name or budget, or the default one, or why there is none."""
        asked = self._defaults.schedule if wanted is None else wanted
        if isinstance(asked, Schedule):
            return asked
        resolution = self._of_size(size)
        try:
            return find_schedule(
                self._pipeline.bundle,
                asked,
                size,
                lambda steps: self._pipeline.grid(steps, resolution),
            )
        except MeanCacheError as error:
            return _copied(error)

    def _with_evidence(self, scale: float | None, size: PictureSize) -> list[Schedule]:
        """The bundle's schedules whose PSNR is on record, and that may be used at a scale and size.

        Where grids of several sizes are equal, those that were calibrated at this one, if any.
        """
        usable = []
        for schedule in self._calibrated:
            with contextlib.suppress(ScheduleError):
                usable.append(self._pipeline.schedule(schedule, scale, self._of_size(size)))
        return [found for found in usable if calibrated_size(found) == size] or usable

    @cached_property
    def _calibrated(self) -> list[Schedule]:
        bundle = self._pipeline.bundle
        schedules = [bundle.schedule(name) for name in bundle.schedule_names()]
        return [found for found in schedules if found.calibration and found.calibration.fidelity]

    def _of_size(self, size: PictureSize) -> Resolution:
        return self._pipeline.resolution(size.height, size.width, size.frames)


def _copied(error: MeanCacheError) -> MeanCacheError:
    """The same error without its traceback, whose frames would stay in memory with it."""
    return type(error)(str(error))


def _smallest(
    schedules: Sequence[Schedule], target: float, percentile: float | None
) -> Schedule | InputError:
    """The schedule of fewest evaluations, and of those the best, that kept `target` dB."""
    where = "on average" if percentile is None else f"at percentile {percentile:g}"
    known = {found.name: _psnr(found, percentile) for found in schedules}
    enough = [found for found in schedules if known[found.name] >= target]
    if enough:
        return min(enough, key=lambda found: (found.budget, -known[found.name], found.name))
    there = ", ".join(f"{name} {psnr:.2f} dB" for name, psnr in known.items())
    return InputError(
        f"no schedule of the bundle is known to keep {target:g} dB {where} at this size and "
        f"guidance scale; it has {there or 'none that was measured'}. Add one with "
        f"`meancache-trt bake --target-psnr {target:g}`"
    )


def _psnr(schedule: Schedule, percentile: float | None) -> float:
    assert schedule.calibration is not None
    assert schedule.calibration.fidelity is not None
    summary = schedule.calibration.fidelity.psnr
    return summary.mean if percentile is None else summary.p5


def check_all(
    lines: Sequence[Line], checker: Checker, *, skip_bad: bool
) -> tuple[list[Ticket], list[Line]]:
    """Tickets of all lines in order, and the lines that are at fault.

    Raises `InputError` that lists faults by line and counts them, where there are some and they are
    not to be skipped, or where no job is left.
    """
    tickets: list[Ticket] = []
    faults: list[Line] = []
    for index, line in enumerate(lines):
        if line.job is None:
            faults.append(line)
            continue
        try:
            tickets.append(checker.check(index, line.job))
        except MeanCacheError as error:
            faults.append(Line(line.number, None, str(error)))
    if faults and not (skip_bad and tickets):
        raise InputError(_told(faults, len(lines)))
    return tickets, faults


def _told(faults: Sequence[Line], count: int) -> str:
    told = [f"  {fault}" for fault in faults[:_FAULTS_SHOWN]]
    more = [f"  and {len(faults) - len(told):,} more"] if len(faults) > len(told) else []
    return "\n".join(
        [f"{len(faults):,} of {count:,} jobs cannot be rendered; nothing was:", *told, *more]
    )
