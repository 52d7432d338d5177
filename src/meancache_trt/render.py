"""Render pictures from a bundle: the Python host.

with meancache_trt.load("flux.mcb") as pipeline:
    pipeline.render(["a prompt"], seed=0, schedule="b10")[0].save("out.png")
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from meancache_trt.bundle import Bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.embedding_cache import open_cache
from meancache_trt.encoding import BundleEncoder
from meancache_trt.engine.probe import Gpu
from meancache_trt.engine.select import check_backend, open_runtime
from meancache_trt.errors import InputError
from meancache_trt.export.text import TextPrecision
from meancache_trt.graphs import Graphs
from meancache_trt.manifest import Resolution, check_guidance
from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.noise import draw_noise
from meancache_trt.meancache.runtime import Runtime
from meancache_trt.meancache.schedule import Schedule
from meancache_trt.meancache.sigmas import SigmaGrid
from meancache_trt.rendering import NoiseSource, Rendering
from meancache_trt.selection import (
    check_grid,
    check_model,
    find_resolution,
    find_schedule,
    pipeline_grid,
)
from meancache_trt.session import Session
from meancache_trt.text_length import cut_to_bucket

OnImage = Callable[[int, int, int, int], None]
"""(picture index, pictures, evaluations done, B), called after each evaluation."""


class Pipeline:
    """A bundle on a backend. A context manager; not thread-safe.

    `load` explains the arguments. A `runtime` is used instead of opening the backend; the caller
    closes it, after the pipeline. `gpu` is what `check_backend` found for the backend.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = "auto",
        threads: int = 0,
        runtime: Runtime | None = None,
        gpu: Gpu | None = None,
        precision: str | None = None,
        embedding_cache: Path | str | None = None,
        text_precision: TextPrecision = "float32",
        keep_encoders: bool = True,
    ) -> None:
        self.bundle = bundle
        self._is_owner = runtime is None
        self.runtime = runtime or open_runtime(backend, bundle=bundle, threads=threads, gpu=gpu)
        self.graphs = Graphs(bundle, self.runtime, precision)
        self._sessions: dict[tuple[Schedule, tuple[int, ...], int], Session] = {}
        self.text_precision = text_precision
        self._new_encoder = functools.partial(
            BundleEncoder,
            precision=text_precision,
            cache=open_cache(embedding_cache),
            keep_encoders=keep_encoders,
        )
        self._encoder = self._new_encoder(self.graphs)

    def __enter__(self) -> Self:
        if self._is_owner:
            self.runtime.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sessions.clear()
        if self._is_owner:
            self.runtime.__exit__(kind, error, trace)

    def encoder_on(self, graphs: Graphs) -> BundleEncoder:
        """An encoder like the pipeline's own whose text graphs run elsewhere, such as on a lane."""
        return self._new_encoder(graphs)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the bundle's text encoders, each once; see `load` for the cache.

        Needs torch and transformers where the bundle has no graphs of all its text encoders.
        Raises `InputError` for no prompts, `RuntimeUnavailableError` for a missing package.
        """
        return self._encoder.encode(prompts)

    def grid(self, steps: int, resolution: Resolution | None = None) -> SigmaGrid:
        """The grid that the checkpoint's own pipeline would use with this many steps."""
        export = self.bundle.export
        return pipeline_grid(export, steps, resolution or export.resolution)

    def resolution(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> Resolution:
        """The first of the bundle's resolutions that has the values given; its default for none.

        Raises `BundleError` that lists what there is and says how to add another.
        """
        return find_resolution(self.bundle, height, width, frames)

    def schedule(
        self,
        schedule: str | int | Path | Schedule | None = None,
        guidance_scale: float | None = None,
        resolution: Resolution | None = None,
    ) -> Schedule:
        """Find a schedule and check that it belongs to this bundle and resolution.

        Args:
            schedule: a name in the bundle, a budget, a file, or None for the bundle's largest
                calibrated one (its largest, where none is calibrated). Of a budget, and for None,
                those count that are calibrated for the resolution.
            guidance_scale: what will be rendered with; see `guidance`.
            resolution: what will be rendered; by default the bundle's default.

        Raises:
            BundleError: where the bundle has none of that name or budget.
            ScheduleError: where it belongs to another model, grid or guidance scale, or to a
                precision that says nothing of the network's.
        """
        rendered = resolution or self.bundle.export.resolution

        def grid_of(steps: int) -> SigmaGrid:
            return self.grid(steps, rendered)

        if isinstance(schedule, Schedule):
            found = schedule
        else:
            found = find_schedule(self.bundle, schedule, rendered.size, grid_of)
        check_model(self.bundle.export, found)
        found.check_precision(self.graphs.network("transformer").precision)
        grid = grid_of(found.grid.steps)
        check_grid(self.bundle, found, rendered.size, grid)
        return found.fit_to(grid, self.guidance(guidance_scale, found))

    def session(
        self,
        schedule: Schedule,
        resolution: Resolution | None = None,
        text_tokens: int | None = None,
    ) -> Session:
        """The session of a schedule, size and text length; made once, then kept.

        `text_tokens` is by default the bundle's full length.
        """
        size = resolution or self.bundle.export.resolution
        length = self.bundle.export.text_tokens if text_tokens is None else text_tokens
        key = (schedule, size.noise_shape, length)
        if key not in self._sessions:
            self._sessions[key] = Session(self.graphs, schedule, size.with_text(length))
        return self._sessions[key]

    def guidance(
        self, guidance_scale: float | None = None, schedule: Schedule | None = None
    ) -> float | None:
        """The scale to render with: the one given, the schedule's own, or the model's default.

        Raises `InputError` for a scale that the model cannot take.
        """
        guidance = self.bundle.export.guidance
        if guidance_scale is None and schedule is not None:
            guidance_scale = schedule.guidance_scale
        check_guidance(guidance, guidance_scale)
        return guidance.default_scale if guidance_scale is None else guidance_scale

    def render(
        self,
        prompts: Sequence[str] | Conditioning,
        *,
        negative_prompt: str | Sequence[str] | Conditioning = "",
        seed: int | Sequence[int] = 0,
        schedule: str | int | Path | Schedule | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        noise: NoiseSource = "philox",
        vae_tiling: bool = False,
        on_evaluation: OnImage | None = None,
    ) -> list[Rendering]:
        """Render one picture for each prompt.

        A picture depends on its own prompt and seed alone, not on its place in the list. The
        network runs on the shortest of the bundle's text lengths that holds the prompt and its
        negative prompt.

        Args:
            prompts: texts, or what `encode` made of them (then torch is not needed).
            negative_prompt: what to steer away from, for models with classifier-free guidance: one
                for all or one for each, as texts or as what `encode` made of them. diffusers turns
                guidance off where it is given none; here that is `guidance_scale=1`, but for a
                second stage with a scale of its own.
            seed: one for all, or one for each.
            schedule: see `schedule`.
            guidance_scale: by default the schedule's, or the model's.
            height: pixels; see `resolution`, as for width and frames.
            width: pixels.
            frames: of a video.
            noise: "philox" is this project's generator, the same in every host; "torch" gives
                diffusers' own noise for `torch.Generator("cpu").manual_seed(seed)`.
            vae_tiling: decode in blended tiles as after `pipe.vae.enable_tiling()`: less memory.
            on_evaluation: called after each evaluation; an exception in it cancels.
        """
        seeds = _seeds(seed, _count(prompts))
        size = self.resolution(height, width, frames)
        chosen = self.schedule(schedule, guidance_scale, size)
        scale = self.guidance(guidance_scale, chosen)
        starts = [draw_noise(noise, start, size.noise_shape) for start in seeds]
        conditionings = self._encoder.for_pictures(prompts, negative_prompt)
        schedule_digest = digest_of(encode_json(chosen))
        renderings = []
        for index, conditioning in enumerate(conditionings):
            prompt, *negatives = conditioning.prompts
            length, tensors = cut_to_bucket(self.bundle.export, conditioning)
            batch = self.session(chosen, size, length).run(
                starts[index][None],
                tensors,
                scale,
                _for_image(on_evaluation, index, len(seeds)),
                vae_tiling=vae_tiling,
            )
            renderings.append(
                Rendering(
                    prompt=prompt,
                    seed=seeds[index],
                    noise=noise,
                    schedule=chosen.name,
                    schedule_digest=schedule_digest,
                    guidance_scale=scale,
                    bundle_id=self.bundle.manifest.bundle_id,
                    latent=batch.latents[0],
                    pixels=batch.pictures[0],
                    loop_ms=batch.loop_ms,
                    frames_per_second=self.bundle.export.frames_per_second,
                    negative_prompt=negatives[0] if negatives else None,
                    vae_tiling=vae_tiling,
                )
            )
        return renderings


def load(
    bundle: Path | str,
    *,
    backend: str = "auto",
    threads: int = 0,
    precision: str | None = None,
    is_full_check: bool = False,
    embedding_cache: Path | str | None = None,
    text_precision: TextPrecision = "float32",
    keep_encoders: bool = True,
) -> Pipeline:
    """Open a bundle for rendering; use it in a `with` block.

    Args:
        bundle: the directory.
        backend: "auto" or a name that `meancache-trt doctor` lists.
        threads: cores that one graph may use; 0 means all.
        precision: of the transformer's graph, where the bundle has several; by default what the
            backend prefers.
        is_full_check: hash the weights even where their size and times are unchanged.
        embedding_cache: the directory where encoded prompts are kept, at most 1 GiB of them; by
            default in the user's cache directory, "off" for none.
        text_precision: "checkpoint" has torch load the text encoders in the dtype in which they
            are stored, also where the bundle has graphs of them: less memory, rounded embeddings.
        keep_encoders: whether text encoders stay in memory while the network runs, for the next
            prompts.

    Raises:
        BundleError: where it is damaged or no bundle.
        RuntimeUnavailableError: where the backend cannot run here.
        PlanMismatchError: where it needs plans, and the bundle has none for it.
    """
    gpu = check_backend(backend)  # before anything is read and hashed
    opened = Bundle.open(bundle, is_full_check=is_full_check)
    return Pipeline(
        opened,
        backend=backend,
        threads=threads,
        gpu=gpu,
        precision=precision,
        embedding_cache=embedding_cache,
        text_precision=text_precision,
        keep_encoders=keep_encoders,
    )


def _count(prompts: Sequence[str] | Conditioning) -> int:
    if isinstance(prompts, str):
        raise InputError(f"prompts are a list, found one text; give [{prompts!r}]")
    return len(prompts.prompts if isinstance(prompts, Conditioning) else prompts)


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed] * count
    if len(seed) != count:
        raise InputError(f"{count} prompts need {count} seeds or a single one, found {len(seed)}")
    return list(seed)


def _for_image(
    on_evaluation: OnImage | None, index: int, count: int
) -> Callable[[int, int], None] | None:
    if on_evaluation is None:
        return None
    return lambda done, budget: on_evaluation(index, count, done, budget)
