"""`render` and `encode`."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from meancache_trt.cli import batch, options, picture_options
from meancache_trt.cli.batch import Batching
from meancache_trt.cli.output import note, print_json, print_table, progress
from meancache_trt.cli.picture_options import Opening
from meancache_trt.conditioning import Conditioning
from meancache_trt.errors import InputError
from meancache_trt.export.text import TextPrecision
from meancache_trt.meancache.files import atomic_write, made_directory, read_bytes
from meancache_trt.media.formats import OutputFormat, check_formats
from meancache_trt.production.names import slug
from meancache_trt.production.tickets import Defaults, Settings
from meancache_trt.render import load
from meancache_trt.rendering import Rendering


@click.command()
@options.bundle
@click.option("--prompt", "texts", multiple=True, help="A prompt; may be given several times.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path),
    help="A job file: .jsonl or .csv with the fields of jobs, .txt with one prompt a line.",
)
@click.option(
    "--embeddings",
    type=click.Path(path_type=Path),
    help="What `encode` wrote; no text encoder is then needed.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory.")
@picture_options.formats
@picture_options.defaults
@picture_options.settings
@picture_options.opening
@batch.options_of_run
@options.as_json
def render(
    bundle: Path,
    texts: tuple[str, ...],
    file: Path | None,
    embeddings: Path | None,
    output: Path,
    formats: tuple[OutputFormat, ...],
    defaults: Defaults,
    settings: Settings,
    opening: Opening,
    batching: Batching,
    as_json: bool,
) -> None:
    """Render a picture for each prompt into a directory.

    The same bundle, prompt, seed and schedule always give the same file. --height, --width and
    --frames choose among the bundle's resolutions: the first that has what is given.

    --prompts begins a run, which may be killed at any time and goes on when the same command is
    given again, also by several processes at once; DIRECTORY/results.jsonl tells of each job. What
    a job does not say is taken from the options. The options from --target-psnr to --actors are
    those of a run.
    """
    _check_one_source(texts, file, embeddings)
    if file is not None:
        batch.render_jobs(
            bundle, file, output, formats, defaults, settings, opening, batching, as_json=as_json
        )
        return
    batching.check_unused()
    prompts = list(texts) if embeddings is None else Conditioning.load(embeddings)
    formats = formats or (OutputFormat("png"),)
    with (
        output_directory(output, formats) as save,
        opening.open(bundle, threads=opening.threads, keep_encoders=False) as pipeline,
    ):
        size = pipeline.resolution(defaults.height, defaults.width, defaults.frames).size
        check_formats(formats, size)
        with progress("rendering") as report:
            renderings = pipeline.render(
                prompts,
                negative_prompt=defaults.negative_prompt,
                seed=defaults.seed,
                schedule=defaults.schedule,
                guidance_scale=defaults.guidance_scale,
                height=defaults.height,
                width=defaults.width,
                frames=defaults.frames,
                noise=settings.noise,
                vae_tiling=settings.vae_tiling,
                on_evaluation=lambda image, images, done, budget: report(
                    image * budget + done, images * budget
                ),
            )
        paths = [save(index, rendering) for index, rendering in enumerate(renderings)]
    _print_summary(renderings, paths, as_json=as_json)


@click.command()
@options.bundle
@click.option("--prompt", "texts", multiple=True, help="A prompt; may be given several times.")
@click.option(
    "--prompts", "file", type=click.Path(path_type=Path), help="A text file, one prompt a line."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File.")
@options.embedding_cache
@options.text_precision
def encode(
    bundle: Path,
    texts: tuple[str, ...],
    file: Path | None,
    output: Path,
    embedding_cache: str | None,
    text_precision: TextPrecision,
) -> None:
    """Encode prompts into a safetensors file that `render --embeddings` takes."""
    _check_one_source(texts, file)
    prompts = list(texts) if file is None else read_prompts(file)
    with load(bundle, embedding_cache=embedding_cache, text_precision=text_precision) as pipeline:
        pipeline.encode(prompts).save(output)
    note(f"wrote {output}: {len(prompts)} prompts")


@contextlib.contextmanager
def output_directory(
    directory: Path, formats: Sequence[OutputFormat]
) -> Iterator[Callable[[int, Rendering], list[Path]]]:
    """Make a directory and yield what saves picture i in it as NNNN-words, once in each format.

    Where anything fails, the pictures written go again, and the directory if it was made here.
    Raises `InputError` where it cannot be made.
    """
    written: list[Path] = []

    def save(index: int, rendering: Rendering) -> list[Path]:
        name = f"{index:04d}-{slug(rendering.prompt)}"
        paths = [directory / f"{name}{form.suffix}" for form in formats]
        for path, form in zip(paths, formats, strict=True):
            is_replaced = path.exists()
            with atomic_write(path) as temporary:
                temporary.write_bytes(rendering.encode(form))
            written.extend([] if is_replaced else [path])
        return paths

    with made_directory(directory):
        try:
            yield save
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise


def _check_one_source(
    texts: tuple[str, ...], file: Path | None, embeddings: Path | None = None
) -> None:
    if sum((bool(texts), file is not None, embeddings is not None)) != 1:
        raise click.UsageError("give --prompt, --prompts FILE or --embeddings FILE, and only one")


def read_prompts(file: Path) -> list[str]:
    """Non-empty lines of a UTF-8 file. Raises `InputError` where there are none."""
    try:
        lines = read_bytes(file).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"expected one prompt a line in {file}, found none; write some")
    return prompts


def _print_summary(renderings: list[Rendering], paths: list[list[Path]], *, as_json: bool) -> None:
    rows = [
        {
            "path": str(files[0]),
            "files": [str(path) for path in files],
            "prompt": rendering.prompt,
            "seed": rendering.seed,
            "schedule": rendering.schedule,
            "guidance_scale": rendering.guidance_scale,
            "loop_ms": round(rendering.loop_ms, 3),
        }
        for rendering, files in zip(renderings, paths, strict=True)
    ]
    if as_json:
        print_json({"images": rows})
        return
    print_table(["picture", "loop ms"], [[row["path"], f"{row['loop_ms']:.1f}"] for row in rows])
    median = statistics.median(rendering.loop_ms for rendering in renderings)
    note(f"{len(rows)} pictures, schedule {renderings[0].schedule}, median loop {median:.1f} ms")
