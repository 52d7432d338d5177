"""Render every competitor, compare it with the references, and keep what is done.

In the directory of an evaluation:

    evaluation.json      the result
    rows/                each finished method and budget, so that a run that goes on skips it
    schedules/           what was baked for it
    references/          latents and pictures of the references, while the run lasts
    thumbnails/          for the report; pictures/ besides where they are asked for
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from meancache_trt.calibration.evaluation import (
    FILE,
    Comparison,
    EdgeCostMap,
    Evaluation,
    Row,
    compare_batches,
    compared,
    joined,
    row_key,
    schedule_facts,
)
from meancache_trt.calibration.metrics import require_ssim
from meancache_trt.calibration.trajectories import Prompt, Trajectories
from meancache_trt.errors import InputError, MeanCacheError
from meancache_trt.evaluate.competitors import Competitor, ScheduleStore
from meancache_trt.evaluate.machine import describe_machine
from meancache_trt.evaluate.pictures import PictureStore
from meancache_trt.evaluate.renderer import Render, Renderer
from meancache_trt.meancache.files import decode_json, encode_json, write_json, write_tensors
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.schedule import FITTED, Schedule, bake
from meancache_trt.record import Note, Report
from meancache_trt.session import Batch

FULL = "full"
"""The model's own T steps, as a row."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured besides the competitors.

    `steps` is T; `reference_steps` those of the fine reference, None for none. `against` is the
    method of the paired differences: None means the fitted one, or else the first. `rounded` are
    renderers of the same model in other precisions, each to be closed by who made it.
    """

    prompts: tuple[Prompt, ...]
    steps: int
    reference_steps: int | None = None
    against: str | None = None
    rounded: Sequence[Renderer] = ()
    edge_costs: EdgeCostMap | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("there are no prompts to evaluate on; give at least one")
        if self.reference_steps is not None and self.reference_steps <= self.steps:
            raise InputError(
                f"a fine reference has more steps than the model's own {self.steps}, found "
                f"{self.reference_steps}; 200 is usual"
            )


def measure(
    renderer: Renderer,
    competitors: Sequence[Competitor],
    plan: Plan,
    directory: Path,
    *,
    pictures: PictureStore | None = None,
    note: Note,
    report: Report,
) -> Evaluation:
    """Measure all competitors and write `directory`/evaluation.json.

    Rows that an earlier run finished there with the same model, prompts, settings and schedule are
    taken from it. One batch of pictures is in memory at a time.

    Raises:
        MeanCacheError: what rendering, baking and the metrics raise; nothing finished is lost.
    """
    require_ssim()
    if plan.against is not None:
        _check_against(plan.against, competitors)
    table = _Table(renderer, plan, directory, pictures, _Counter(competitors, plan, report))
    full = table.full()
    schedules = ScheduleStore(directory / "schedules")
    rows = []
    for competitor in competitors:
        note(f"evaluate: {competitor.method}, {competitor.budget} evaluations")
        rows.append(table.row(competitor.method, schedules.schedule(competitor)))
    floor, notes = _noise_floor(plan, table)
    against = plan.against or _default_against(competitors)
    evaluation = Evaluation(
        setup=table.setup,
        machine=describe_machine(),
        prompts=plan.prompts,
        full=full,
        rows=compared(rows, against),
        against=against,
        noise_floor=floor,
        edge_costs=plan.edge_costs,
        notes=(*plan.notes, *notes),
    )
    write_json(directory / FILE, evaluation)
    shutil.rmtree(directory / "references", ignore_errors=True)
    return evaluation


def check_unseen(prompts: Sequence[Prompt], trajectories: Trajectories) -> tuple[str, ...]:
    """What must be said of prompts that calibration has seen too, under other seeds.

    Raises `InputError` where a prompt was calibrated on with the same seed.
    """
    seen = {(sample.prompt.text, sample.prompt.seed) for sample in trajectories.samples}
    same = [prompt for prompt in prompts if (prompt.text, prompt.seed) in seen]
    if same:
        raise InputError(
            f"expected prompts that were not calibrated on, found {same[0].text!r} with seed "
            f"{same[0].seed} in {trajectories.directory}; evaluate on others, or with another "
            "--seed"
        )
    texts = {text for text, _ in seen}
    again = {prompt.text for prompt in prompts if prompt.text in texts}
    if not again:
        return ()
    return (
        f"{len(again)} of the prompts were calibrated on too, with other seeds: numbers on new "
        "prompts may be lower",
    )


def _check_against(method: str, competitors: Sequence[Competitor]) -> None:
    known = list(dict.fromkeys(each.method for each in competitors))
    if method not in known:
        raise InputError(
            f"differences are taken from one of the evaluated methods, {', '.join(known)}; found "
            f"{method!r}"
        )


def _default_against(competitors: Sequence[Competitor]) -> str:
    methods = [each.method for each in competitors]
    return FITTED if FITTED in methods else methods[0]


class _Counter:
    """Progress in network evaluations of single pictures, baking left out."""

    def __init__(self, competitors: Sequence[Competitor], plan: Plan, report: Report) -> None:
        budgets = [each.budget for each in competitors]
        per_picture = sum(budgets) + plan.steps + (plan.reference_steps or 0)
        self._total, self._done, self._report = per_picture * len(plan.prompts), 0, report

    def add(self, evaluations: int) -> None:
        self._done = min(self._done + evaluations, self._total)
        self._report(self._done, self._total)


class _Table:
    """Rows against the references, of one renderer."""

    def __init__(
        self,
        renderer: Renderer,
        plan: Plan,
        directory: Path,
        pictures: PictureStore | None,
        counter: _Counter,
    ) -> None:
        self._renderer, self._plan, self._directory = renderer, plan, directory
        self._pictures, self._counter = pictures, counter
        self.setup = renderer.setup(plan.steps, plan.reference_steps)
        size = renderer.batch
        prompts = plan.prompts
        self._batches = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        self._own = self._reference(plan.steps)
        self._fine = self._reference(plan.reference_steps) if plan.reference_steps else None

    def full(self) -> Row:
        """The model's own T steps, measured against the fine reference alone."""
        return self._kept(FULL, self._own.schedule, lambda: self._own.batch, is_own=True)

    def row(self, method: str, schedule: Schedule) -> Row:
        """A method's schedule, measured or taken from an earlier run."""

        def rendered() -> Callable[[int], Batch]:
            render = self._renderer.open(schedule)
            return lambda index: self._count(render, index, schedule.budget)

        return self._kept(method, schedule, rendered)

    def row_of(self, renderer: Renderer, method: str) -> Row:
        """The T steps again, by another renderer; nothing of it is kept."""
        schedule = self._own.schedule
        render = renderer.open(schedule)
        return self._measured(method, schedule, lambda index: render(self._batches[index]))

    def _kept(
        self,
        method: str,
        schedule: Schedule,
        rendered: Callable[[], Callable[[int], Batch]],
        *,
        is_own: bool = False,
    ) -> Row:
        key = row_key(method, schedule.budget)
        path = self._directory / "rows" / f"{key}.{self._digest(schedule)}.json"
        if path.exists() and (
            not self._pictures or self._pictures.has(key, len(self._plan.prompts))
        ):
            self._counter.add(schedule.budget * len(self._plan.prompts))
            return decode_json(path, Row, InputError)
        row = self._measured(method, schedule, rendered(), is_own=is_own, pictures=self._pictures)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, row)
        return row

    def _measured(
        self,
        method: str,
        schedule: Schedule,
        batch_of: Callable[[int], Batch],
        *,
        is_own: bool = False,
        pictures: PictureStore | None = None,
    ) -> Row:
        own: list[Comparison] = []
        fine: list[Comparison] = []
        times: list[float] = []
        first = 0
        for index, prompts in enumerate(self._batches):
            made = batch_of(index)
            times.append(made.loop_ms / len(prompts) / schedule.budget)
            if not is_own:
                own.append(_comparison(made, self._own.batch(index)))
            if self._fine:
                fine.append(_comparison(made, self._fine.batch(index)))
            if pictures:
                pictures.save(row_key(method, schedule.budget), first, prompts, made.pictures)
            first += len(prompts)
        return Row(
            method=method,
            budget=schedule.budget,
            schedule=schedule_facts(schedule),
            ms_per_evaluation=min(times),
            own=joined(own) if own else None,
            fine=joined(fine) if fine else None,
        )

    def _count(self, render: Render, index: int, budget: int) -> Batch:
        prompts = self._batches[index]
        made = render(prompts)
        self._counter.add(budget * len(prompts))
        return made

    def _reference(self, steps: int) -> _Reference:
        schedule = bake("euler", self._renderer.grid(steps), range(steps), name=f"full-{steps}")
        folder = self._directory / "references" / f"{steps}-{self._digest(schedule)}"
        render: list[Render] = []

        def batch_of(index: int) -> Batch:
            if not render:
                render.append(self._renderer.open(schedule))
            return self._count(render[0], index, schedule.budget)

        return _Reference(schedule, folder, batch_of)

    def _digest(self, schedule: Schedule) -> str:
        """Of all that a row follows from."""
        return digest_of(encode_json([self.setup, self._plan.prompts, schedule]))[:16]


@dataclass(frozen=True)
class _Reference:
    """Batches of a reference, each rendered when it is first needed and then read from disk."""

    schedule: Schedule
    folder: Path
    render: Callable[[int], Batch]

    def batch(self, index: int) -> Batch:
        path = self.folder / f"{index:04d}.safetensors"
        if path.exists():
            stored = load_file(path)
            return Batch(stored["latents"], stored["pictures"], float(stored["loop_ms"][0]))
        made = self.render(index)
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "latents": made.latents,
            "pictures": made.pictures,
            "loop_ms": np.array([made.loop_ms]),
        }
        write_tensors(path, tensors, {})
        return made


def _comparison(made: Batch, reference: Batch) -> Comparison:
    return compare_batches(made.pictures, made.latents, reference.pictures, reference.latents)


def _noise_floor(plan: Plan, table: _Table) -> tuple[Row | None, tuple[str, ...]]:
    """The T steps in the first other precision that runs, and what to say where none does."""
    failures = []
    for renderer in plan.rounded:
        precision = renderer.setup(plan.steps, None).precision
        try:
            return table.row_of(renderer, f"{FULL}, {precision}"), ()
        except MeanCacheError:
            failures.append(f"no noise floor: the {precision} graphs of the bundle do not run here")
    return None, tuple(failures)
