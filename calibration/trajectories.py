"""Recorded integrations: every velocity of a full T-step run, one file a sample.

A directory holds `trajectories.json`, written anew after each sample, and one safetensors file
for each. Recording can be interrupted at any time and resumed; samples are read one at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.files import (
    decode_json,
    encode_json,
    made_directory,
    write_json,
    write_tensors,
)
from meancache_trt.meancache.schedule import ModelReference
from meancache_trt.meancache.sigmas import SigmaGrid

MANIFEST = "trajectories.json"

CONSISTENCY_TOLERANCE = 0.05
"""Relative distance of the final latent from initial + Σ Δσ·v. Float32 gives 1e-6, and a bfloat16
pipeline drifts by up to 0.007 (diffusers 0.42.1); more means that something else moved it."""

Array = NDArray[np.float32]
OnStep = Callable[[int, Array], None]
Report = Callable[[int, int], None]
"""(samples done, samples in all) -> None; called before the first and after each."""


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is sampled: a text, the seed of its noise and, where samples differ in it, the scale."""

    text: str
    seed: int = 0
    guidance_scale: float | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What trajectories depend on besides their prompts; one directory has one.

    Size and number of frames are in the grid. `precision` is that of the network, as "bfloat16".
    With a `guidance_range` each prompt has a scale of its own within it.
    """

    grid: SigmaGrid
    guidance_scale: float | None = None
    guidance_range: tuple[float, float] | None = None
    family: str | None = None
    model: ModelReference | None = None
    precision: str = "float32"
    text_tokens: int | None = None

    def guidance_of(self, prompt: Prompt) -> float | None:
        """The scale that a prompt is sampled with."""
        return self.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale

    def difference(self, other: Settings) -> str | None:
        """Say in words how `other` differs, or None where they are the same."""
        gap = self.grid.difference(other.grid)
        if gap is not None:
            return gap
        for name in _COMPARED:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name.replace('_', ' ')} {mine} against {theirs}"
        for name in ("height", "width", "frames", "second_stage"):
            mine, theirs = getattr(self.grid, name), getattr(other.grid, name)
            if mine != theirs:
                return f"{name.replace('_', ' ')} {mine} against {theirs}"
        return None


_COMPARED = (
    *("guidance_scale", "guidance_range"),
    *("family", "model", "precision", "text_tokens"),
)


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A complete recording: its prompt, its file beside the manifest, and what it cost."""

    prompt: Prompt
    file: str
    seconds: float


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`trajectories.json`."""

    schema: Literal["meancache-trt/trajectories/1"] = "meancache-trt/trajectories/1"
    settings: Settings
    samples: tuple[Sample, ...] = ()


class Sampler(Protocol):
    """A model that integrates all T steps of its grid: a diffusers pipeline, or an engine."""

    def __call__(self, prompt: Prompt, on_step: OnStep) -> tuple[Array, Array]:
        """Integrate from the prompt's noise, and return the initial and the final latent.

        `on_step(step, velocity)` is called once for each of the T steps, in order, with the
        velocity that moves the latent (after guidance), float32, in the latent's shape.
        """


@dataclass(frozen=True)
class Trajectory:
    """One sample in memory: `velocities` (T, N) and latents (N,), float32, flattened."""

    prompt: Prompt
    velocities: Array
    initial: Array
    final: Array


@dataclass(frozen=True)
class Trajectories:
    """Complete recordings on disk; iterating reads one at a time."""

    directory: Path
    settings: Settings
    samples: tuple[Sample, ...]

    @property
    def grid(self) -> SigmaGrid:
        """The grid that all of them were integrated over."""
        return self.settings.grid

    @property
    def seconds(self) -> float:
        """Time spent on recording, whether in this run or before."""
        return sum(sample.seconds for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Trajectory]:
        for sample in self.samples:
            yield self._read(sample)

    def velocities(self, index: int, start: int, end: int) -> Array:
        """Velocities at steps `start` to `end` − 1 of one sample, (end − start, N), and no more."""
        with self._opened(self.samples[index]) as stored:
            velocities = stored.get_slice("velocities")[start:end]
        return np.asarray(velocities.reshape(end - start, -1))

    def initial(self, index: int) -> Array:
        """The initial latent (N,) of one sample, and no more."""
        return self._tensor(index, "initial")

    def final(self, index: int) -> Array:
        """The final latent (N,) of one sample, and no more."""
        return self._tensor(index, "final")

    def _tensor(self, index: int, name: str) -> Array:
        with self._opened(self.samples[index]) as stored:
            return np.asarray(stored.get_tensor(name).reshape(-1))

    def _read(self, sample: Sample) -> Trajectory:
        with self._opened(sample) as stored:
            velocities = stored.get_tensor("velocities")
            ends = [stored.get_tensor(name).reshape(-1) for name in ("initial", "final")]
        return Trajectory(sample.prompt, velocities.reshape(len(velocities), -1), *ends)

    @contextlib.contextmanager
    def _opened(self, sample: Sample) -> Iterator[Any]:
        """The file of a sample. Raises `CalibrationError` where it is not as it was recorded."""
        path = self.directory / sample.file
        try:
            with safe_open(path, framework="numpy") as stored:
                self._check_steps(path, stored.get_slice("velocities").get_shape()[0])
                yield stored
        except (OSError, SafetensorError) as error:
            raise CalibrationError(
                f"{path}: expected a complete recording of {sample.prompt.text!r}, found {error}; "
                "record again, complete samples are kept"
            ) from error

    def _check_steps(self, path: Path, found: int) -> None:
        if found != self.grid.steps:
            raise CalibrationError(
                f"{path}: expected {self.grid.steps} velocities, found {found}; delete the file "
                "and record again"
            )


def load_trajectories(directory: Path) -> Trajectories:
    """Open what has been recorded in `directory`.

    Raises:
        InputError: where there is no manifest.
        CalibrationError: where the manifest is malformed, or lists no samples.
    """
    manifest = _read_manifest(directory)
    if not manifest.samples:
        raise CalibrationError(f"{directory} holds no complete sample; record at least one")
    return Trajectories(directory, manifest.settings, manifest.samples)


def discard(directory: Path) -> None:
    """Remove a recording: its manifest and the files that it lists. Nothing there is no error."""
    if not (directory / MANIFEST).exists():
        return
    for sample in _read_manifest(directory).samples:
        (directory / sample.file).unlink(missing_ok=True)
    (directory / MANIFEST).unlink()


def record(
    directory: Path,
    settings: Settings,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    report: Report | None = None,
) -> Trajectories:
    """Record what is not yet there, and return the trajectories of `prompts`, in their order.

    A sample counts as there when the manifest lists it and its file can be opened. One sample is
    in memory at a time.

    Raises:
        CalibrationError: where the directory was recorded with other settings, a velocity is not
            finite, or the latent was moved by more than its velocities.
        InputError: where the directory cannot be written.
    """
    with made_directory(directory):
        known = _resume(directory, settings)
        for done, prompt in enumerate(prompts):
            if report:
                report(done, len(prompts))
            if prompt not in known:
                known[prompt] = _record_one(directory, settings, sampler, prompt)
                manifest = Manifest(settings=settings, samples=tuple(known.values()))
                write_json(directory / MANIFEST, manifest)
    if report:
        report(len(prompts), len(prompts))
    return Trajectories(directory, settings, tuple(known[prompt] for prompt in prompts))


def _resume(directory: Path, settings: Settings) -> dict[Prompt, Sample]:
    if not (directory / MANIFEST).exists():
        return {}
    manifest = _read_manifest(directory)
    difference = manifest.settings.difference(settings)
    if difference is not None:
        raise CalibrationError(
            f"{directory} was recorded with other settings: {difference}; record into another "
            "directory, or delete this one"
        )
    complete = (s for s in manifest.samples if _is_readable(directory / s.file))
    return {sample.prompt: sample for sample in complete}


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        return decode_json(path, Manifest, CalibrationError)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}; record again into another directory") from error


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as stored:
            return "velocities" in stored.keys()  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError):
        return False


def _record_one(directory: Path, settings: Settings, sampler: Sampler, prompt: Prompt) -> Sample:
    started = time.perf_counter()
    tape = _Tape(prompt, settings.grid.steps)
    initial, final = sampler(prompt, tape.add)
    velocities = tape.complete()
    _check_consistent(prompt, settings.grid, velocities, initial, final)
    file = f"{hashlib.sha256(encode_json(prompt)).hexdigest()[:16]}.safetensors"
    tensors = {"velocities": velocities, "initial": initial, "final": final}
    metadata = {"prompt": prompt.text, "seed": str(prompt.seed)}
    write_tensors(directory / file, tensors, metadata)
    return Sample(prompt, file, time.perf_counter() - started)


class _Tape:
    """Velocities of one run as they come, in one array (T, *latent shape)."""

    def __init__(self, prompt: Prompt, steps: int) -> None:
        self._prompt = prompt
        self._steps = steps
        self._count = 0
        self._velocities: Array | None = None

    def add(self, step: int, velocity: Array) -> None:
        if step != self._count or step >= self._steps:
            raise CalibrationError(
                f"expected step {self._count} of {self._steps} for {self._prompt.text!r}, found "
                f"step {step}; a sampler reports each step of its grid once, in order"
            )
        if not np.isfinite(velocity).all():
            raise CalibrationError(
                f"the velocity at step {step} for {self._prompt.text!r} (seed {self._prompt.seed})"
                " has values that are not finite; check the model's precision, or leave this "
                "prompt out"
            )
        if self._velocities is None:
            self._velocities = np.empty((self._steps, *velocity.shape), np.float32)
        self._velocities[step] = velocity
        self._count += 1

    def complete(self) -> Array:
        if self._velocities is None or self._count < self._steps:
            raise CalibrationError(
                f"expected {self._steps} steps for {self._prompt.text!r}, found {self._count}; the "
                "sampler stopped early"
            )
        return self._velocities


def _check_consistent(
    prompt: Prompt, grid: SigmaGrid, velocities: Array, initial: Array, final: Array
) -> None:
    moved = np.tensordot(np.diff(grid.array()).astype(np.float32), velocities, axes=1)
    norm = max(float(np.linalg.norm(final)), 1e-12)
    gap = float(np.linalg.norm(initial + moved - final)) / norm
    if not gap <= CONSISTENCY_TOLERANCE:
        raise CalibrationError(
            f"the velocities recorded for {prompt.text!r} end {gap:.1%} away from the final latent;"
            " expected plain Euler steps. Leave out callbacks and masks that change the latent"
        )
