"""`evaluate`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from click.core import ParameterSource

from meancache_trt.build import find_model
from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.calibration.evaluation import FILE, Evaluation, compared, load_evaluation
from meancache_trt.cli import options
from meancache_trt.cli.evaluation_table import print_evaluation
from meancache_trt.cli.output import hush_libraries, note, print_json, progress
from meancache_trt.cli.render import read_prompts
from meancache_trt.export.text import TextPrecision
from meancache_trt.meancache.files import made_directory, write_json
from meancache_trt.rendering import NoiseSource

if TYPE_CHECKING:
    from meancache_trt.evaluate.request import Request


_OPTIONS = (
    click.option(
        "--schedules",
        type=options.NAMES,
        default=(),
        help="Schedules of the bundle, or files: b10,b15. By default all that are calibrated.",
    ),
    click.option(
        "--methods",
        type=options.NAMES,
        default=(),
        help="Instead: methods to bake from recordings: official,euler, or all. ab2-even is one at "
        "another placement.",
    ),
    click.option(
        "--budgets",
        type=options.BUDGETS,
        default=(),
        help="Evaluations an image for --methods: 6,10,15, which is the default.",
    ),
    click.option(
        "--calibration",
        type=click.Path(path_type=Path),
        help="The recordings for --methods; by default those that `build` left beside the bundle. "
        "Those of a pipeline are made where they are missing, in OUTPUT/calibration by default.",
    ),
    click.option(
        "--calibration-samples",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Pictures to record of a pipeline.",
    ),
    click.option(
        "--prompts",
        "file",
        type=click.Path(path_type=Path),
        help="Prompts that were not calibrated on, one a line; by default packaged ones.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        help="Pictures; by default one for each line of --prompts, or else 32.",
    ),
    click.option(
        "--seed",
        type=int,
        default=1000,
        show_default=True,
        help="Seed of the first picture's noise; the next has the next.",
    ),
    options.steps,
    click.option(
        "--reference-steps",
        type=click.IntRange(min=1),
        help="Compare with a fine reference of so many steps too, such as 200.",
    ),
    click.option(
        "--against",
        metavar="METHOD",
        help="The method that paired differences are taken from; by default fitted, or the first.",
    ),
    options.guidance_scale,
    options.height,
    options.width,
    click.option("--frames", type=click.IntRange(min=1), help="Frames of a video."),
    click.option(
        "--noise",
        type=click.Choice(["philox", "torch"]),
        default="philox",
        show_default=True,
        help="See `render`; a pipeline always has torch's.",
    ),
    click.option(
        "--batch",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Pictures at a time on a bundle's engine: faster, in more memory.",
    ),
    options.backend,
    options.threads,
    options.embedding_cache,
    options.text_precision,
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """These options by their names; `file` has prompts."""

    schedules: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    calibration: Path | None
    calibration_samples: int
    file: Path | None
    samples: int | None
    seed: int
    steps: int
    reference_steps: int | None
    against: str | None
    guidance_scale: float | None
    height: int | None
    width: int | None
    frames: int | None
    noise: NoiseSource
    batch: int
    backend: str
    threads: int
    embedding_cache: str | None
    text_precision: TextPrecision

    def request(self) -> Request:
        """What to evaluate; the prompts are read."""
        from meancache_trt.evaluate.request import Request  # noqa: PLC0415  (see `_run`)

        return Request(
            schedules=self.schedules,
            methods=self.methods,
            budgets=self.budgets,
            calibration=self.calibration,
            calibration_samples=self.calibration_samples,
            texts=None if self.file is None else tuple(read_prompts(self.file)),
            samples=self.samples,
            seed=self.seed,
            steps=self.steps,
            reference_steps=self.reference_steps,
            against=self.against,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            frames=self.frames,
            noise=self.noise,
            batch=self.batch,
            backend=self.backend,
            threads=self.threads,
            embedding_cache=self.embedding_cache,
            text_precision=self.text_precision,
        )


@click.command()
@click.argument("subject")
@options.gathered("asked", Asked, *_OPTIONS)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Directory for evaluation.json and report.html; what is finished there is kept.",
)
@click.option("--pictures", is_flag=True, help="Keep every picture in OUTPUT/pictures too.")
@options.as_json
def evaluate(
    subject: str, asked: Asked, output: Path | None, pictures: bool, as_json: bool
) -> None:
    """Measure methods at budgets on new prompts: PSNR, SSIM, latent error, time.

    SUBJECT is a bundle, rendered by its engine; or a diffusers folder, hub id or standin/flux,
    rendered by diffusers with our scheduler; or the OUTPUT of an earlier run, whose table and
    report are then made again without rendering.

    \b
    A bundle's own schedules:  evaluate flux.mcb -o report
    Methods against others:    evaluate flux.mcb --methods all --budgets 6,10,15 -o report
    Without an engine:         evaluate MODEL --methods official,euler -o report

    Pictures are compared with those of the model's own steps from the same noise. An interrupted
    run goes on where it stopped.
    """
    found = _finished(subject)
    if found is not None:
        _reopen(*found, against=asked.against, output=output, as_json=as_json)
        return
    if pictures and output is None:
        raise click.UsageError("--pictures are kept in --output; give one")
    _refuse_what_does_not_apply(subject)
    hush_libraries()
    request = asked.request()
    with _directory(output) as directory:
        evaluation = _run(subject, request, directory, is_kept=output is not None, whole=pictures)
        _deliver(evaluation, output, as_json=as_json)


def _run(
    subject: str, request: Request, directory: Path, *, is_kept: bool, whole: bool
) -> Evaluation:
    # The extra's packages are needed from here on, and not for `--help`.
    from meancache_trt.evaluate.pictures import PictureStore  # noqa: PLC0415
    from meancache_trt.evaluate.report import require_report  # noqa: PLC0415
    from meancache_trt.evaluate.request import (  # noqa: PLC0415
        evaluate_bundle,
        evaluate_pipeline,
    )

    if is_kept:
        require_report()
    store = PictureStore(directory, keeps_whole=whole) if is_kept else None
    with progress("evaluate") as report:
        if (Path(subject) / MANIFEST).is_file():
            bundle = Bundle.open(subject)
            return evaluate_bundle(
                bundle, request, directory, pictures=store, note=note, report=report
            )
        checkpoint = find_model(subject)
        return evaluate_pipeline(
            checkpoint, request, directory, pictures=store, note=note, report=report
        )


_OF_PIPELINES = {"steps", "calibration_samples"}
_OF_BUNDLES = {"noise", "batch", "backend", "embedding_cache", "text_precision"}


def _refuse_what_does_not_apply(subject: str) -> None:
    if (Path(subject) / MANIFEST).is_file():
        _refuse(_OF_PIPELINES, "a bundle, whose schedules and recordings say so")
    else:
        _refuse(_OF_BUNDLES, "a diffusers pipeline; build a bundle of it")


def _refuse(names: set[str], subject: str) -> None:
    """Raise a usage error for an option of these that was given."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[-1]} does not apply to {subject}")


@contextlib.contextmanager
def _directory(output: Path | None) -> Iterator[Path]:
    """Where to work: the user's directory, or one that is gone afterwards."""
    if output is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    with made_directory(output):
        yield output


def _finished(subject: str) -> tuple[Evaluation, Path] | None:
    """An evaluation that is there already, and its directory."""
    path = Path(subject)
    file = path if path.suffix == ".json" else path / FILE
    if path.suffix != ".json" and not file.is_file():
        return None
    return load_evaluation(file), file.parent


def _reopen(
    evaluation: Evaluation,
    directory: Path,
    *,
    against: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    applies = {"subject", "against", "output", "as_json"}
    _refuse({*click.get_current_context().params} - applies, "a finished evaluation")
    if against is not None:
        rows = compared(evaluation.rows, against)
        evaluation = msgspec.structs.replace(evaluation, rows=rows, against=against)
    with _directory(output or directory) as target:
        _deliver(evaluation, target, as_json=as_json, pictures=directory)


def _deliver(
    evaluation: Evaluation, output: Path | None, *, as_json: bool, pictures: Path | None = None
) -> None:
    if output is not None:
        from meancache_trt.evaluate.report import write_report  # noqa: PLC0415  (needs matplotlib)

        write_json(output / FILE, evaluation)
        write_report(evaluation, output / "report.html", pictures or output)
    for remark in evaluation.notes:
        note(f"note: {remark}")
    if as_json:
        print_json(evaluation)
        return
    for reference in evaluation.references:
        print_evaluation(evaluation, reference)
    if output is not None:
        note(f"report: {output / 'report.html'}")
