"""`render` and `encode`."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from meancache_trt.cli import options
from meancache_trt.cli.output import note, print_json, print_table, progress
from meancache_trt.conditioning import Conditioning
from meancache_trt.errors import InputError
from meancache_trt.export.text import TextPrecision
from meancache_trt.meancache.files import made_directory, read_bytes
from meancache_trt.production.names import slug
from meancache_trt.render import load
from meancache_trt.rendering import NoiseSource, Rendering


@click.command()
@options.bundle
@click.option("--prompt", "texts", multiple=True, help="A prompt; may be given several times.")
@click.option(
    "--prompts", "file", type=click.Path(path_type=Path), help="A text file, one prompt a line."
)
@click.option(
    "--embeddings",
    type=click.Path(path_type=Path),
    help="What `encode` wrote; no text encoder is then needed.",
)
@click.option(
    "--negative-prompt",
    default="",
    help="What to steer away from, for models with classifier-free guidance; empty by default.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory.")
@click.option(
    "--schedule",
    help="A name in the bundle, a number of evaluations, or a schedule file. By default the "
    "bundle's calibrated schedule with most evaluations.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the initial noise.")
@options.guidance_scale
@options.height
@options.width
@click.option("--frames", type=click.IntRange(min=1), help="Frames of a video.")
@click.option(
    "--noise",
    type=click.Choice(["philox", "torch"]),
    default="philox",
    show_default=True,
    help="philox: the same in every host; torch: as diffusers draws it for the seed.",
)
@click.option(
    "--vae-tiling",
    is_flag=True,
    help="Decode large pictures in blended tiles, as diffusers' enable_tiling: in less memory.",
)
@options.backend
@options.threads
@options.embedding_cache
@options.text_precision
@options.as_json
def render(
    bundle: Path,
    texts: tuple[str, ...],
    file: Path | None,
    embeddings: Path | None,
    negative_prompt: str,
    output: Path,
    schedule: str | None,
    seed: int,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    noise: NoiseSource,
    vae_tiling: bool,
    backend: str,
    threads: int,
    embedding_cache: str | None,
    text_precision: TextPrecision,
    as_json: bool,
) -> None:
    """Render a picture for each prompt into a directory.

    The same bundle, prompt, seed and schedule always give the same file. --height, --width and
    --frames choose among the bundle's resolutions: the first that has what is given.
    """
    prompts = _prompts(texts, file, embeddings)
    with (
        output_directory(output) as save,
        load(
            bundle,
            backend=backend,
            threads=threads,
            embedding_cache=embedding_cache,
            text_precision=text_precision,
            keep_encoders=False,
        ) as pipeline,
    ):
        with progress("rendering") as report:
            renderings = pipeline.render(
                prompts,
                negative_prompt=negative_prompt,
                seed=seed,
                schedule=schedule,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                frames=frames,
                noise=noise,
                vae_tiling=vae_tiling,
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
    prompts = _prompts(texts, file, None)
    assert isinstance(prompts, list)
    with load(bundle, embedding_cache=embedding_cache, text_precision=text_precision) as pipeline:
        pipeline.encode(prompts).save(output)
    note(f"wrote {output}: {len(prompts)} prompts")


@contextlib.contextmanager
def output_directory(directory: Path) -> Iterator[Callable[[int, Rendering], Path]]:
    """Make a directory and yield what saves picture i in it as NNNN-words.png.

    Where anything fails, the pictures written go again, and the directory if it was made here.
    Raises `InputError` where it cannot be made.
    """
    written: list[Path] = []

    def save(index: int, rendering: Rendering) -> Path:
        path = directory / f"{index:04d}-{slug(rendering.prompt)}.png"
        is_replaced = path.exists()
        rendering.save(path)
        written.extend([] if is_replaced else [path])
        return path

    with made_directory(directory):
        try:
            yield save
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise


def _prompts(
    texts: tuple[str, ...], file: Path | None, embeddings: Path | None
) -> list[str] | Conditioning:
    if sum((bool(texts), file is not None, embeddings is not None)) != 1:
        raise click.UsageError("give --prompt, --prompts FILE or --embeddings FILE, and only one")
    if embeddings is not None:
        return Conditioning.load(embeddings)
    return list(texts) if file is None else read_prompts(file)


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


def _print_summary(renderings: list[Rendering], paths: list[Path], *, as_json: bool) -> None:
    rows = [
        {
            "path": str(path),
            "prompt": rendering.prompt,
            "seed": rendering.seed,
            "schedule": rendering.schedule,
            "guidance_scale": rendering.guidance_scale,
            "loop_ms": round(rendering.loop_ms, 3),
        }
        for rendering, path in zip(renderings, paths, strict=True)
    ]
    if as_json:
        print_json({"images": rows})
        return
    print_table(["picture", "loop ms"], [[row["path"], f"{row['loop_ms']:.1f}"] for row in rows])
    median = statistics.median(rendering.loop_ms for rendering in renderings)
    note(f"{len(rows)} pictures, schedule {renderings[0].schedule}, median loop {median:.1f} ms")
