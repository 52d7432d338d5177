"""Phases of the guidance-distilled stand-ins: flow matching, then the guidance embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import flow
import torch
import workers
from progress import RunningMean
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

TextStates = tuple[Tensor, ...]


class Network(Protocol):
    """Text encoders and transformer of a stand-in as one `nn.Module`, so that they train together.

    The transformer has double and single blocks and a guidance embedder, named as in FLUX.
    """

    transformer: nn.Module
    text_encoders: tuple[nn.Module, ...]

    def encode_text(self, *token_ids: Tensor) -> TextStates:
        """What the transformer takes of the captions' ids, batch first."""

    def velocity(
        self, latents: Tensor, sigmas: Tensor, guidance: Tensor, text: TextStates
    ) -> Tensor:
        """Velocity of the latents' shape at noise levels `(B,)` under guidance scales `(B,)`."""


@dataclass(frozen=True)
class FlowOptions:
    """Options of a phase that trains the transformer.

    `sigma_mean` is that of the noise levels' logits, `guidance_range` what is distilled.
    """

    seconds: float
    batch_size: int = 48
    learning_rate: float = 1.5e-3
    caption_dropout: float = 0.12
    ema_decay: float = 0.999
    snapshot_seconds: float = 300
    seed: int = 11
    sigma_mean: float = 0.8
    guidance_range: tuple[float, float] = (1.0, 6.0)


@dataclass(frozen=True)
class Workspace:
    """Where the phases leave their results, and how a network becomes a pipeline folder."""

    folder: Path
    save_pipeline: Callable[[nn.Module], None]

    def has(self, phase: str) -> bool:
        """Whether the phase has finished."""
        return (self.folder / f"{phase}.json").exists()

    def has_snapshot(self, phase: str) -> bool:
        """Whether the phase, finished or interrupted, left weights to continue from."""
        return (self.folder / f"{phase}.safetensors").exists()

    def record(self, phase: str, measurements: dict[str, Any], options: Any) -> None:
        """Marks the phase as finished, for every worker."""
        if workers.rank() == 0:
            content = {"measurements": measurements, "options": asdict(options)}
            (self.folder / f"{phase}.json").write_text(json.dumps(content, indent=2) + "\n")
        workers.wait()

    def load(self, phase: str, network: nn.Module) -> None:
        """Reads a phase's averaged weights into the network."""
        load_model(network, self.folder / f"{phase}.safetensors")

    def save(self, phase: str, network: nn.Module) -> None:
        """Writes a phase's averaged weights, and the pipeline made of them."""
        if workers.rank() != 0:
            return
        save_model(network, self.folder / f"{phase}.safetensors")
        self.save_pipeline(network)


@dataclass(frozen=True)
class _Noised:
    """Inputs of one velocity evaluation: latents, noise levels and scales `(B,)`."""

    latents: Tensor
    sigmas: Tensor
    guidance: Tensor


@dataclass(frozen=True)
class _Run:
    """What one phase trains, and on which loss."""

    phase: str
    network: Any
    ema: flow.Ema
    optimizer: flow.Optimizer
    loss_of: Callable[[flow.Batch, torch.Generator], Tensor]


def train_flow(space: Workspace, network: Any, pool: flow.Pool, options: FlowOptions) -> None:
    """Text encoders and transformer learn the velocity, all at a guidance scale of 1."""
    guidance_embedder(network).requires_grad_(False)
    if space.has_snapshot("flow"):
        space.load("flow", network)
    ema = flow.Ema(network, options.ema_decay)
    network.transformer.compile()
    optimizer = flow.Optimizer(_blocks(network), network, options.learning_rate)

    def loss_of(batch: flow.Batch, generator: torch.Generator) -> Tensor:
        sigmas = flow.sample_sigmas(len(batch.latents), generator, options.sigma_mean)
        latents, velocity = flow.noised(batch.latents, sigmas, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = network.encode_text(*batch.token_ids)
            predicted = network.velocity(latents, sigmas, torch.ones_like(sigmas), text)
        return (predicted.float() - velocity).square().mean()

    _run(space, pool, options, _Run("flow", network, ema, optimizer, loss_of))


def distil_guidance(
    space: Workspace,
    new_network: Callable[[], Any],
    pool: flow.Pool,
    options: FlowOptions,
) -> None:
    """The guidance embedding learns v_u + g (v_c - v_u) of the frozen flow-matching model."""
    teacher, student = new_network(), new_network()
    for network in (teacher, student):
        space.load("flow", network)
    if space.has_snapshot("distilled"):
        space.load("distilled", student)
    teacher.requires_grad_(False).eval().transformer.compile()
    for encoder in student.text_encoders:
        encoder.requires_grad_(False)
    ema = flow.Ema(student, options.ema_decay)
    student.transformer.compile()
    optimizer = flow.Optimizer(_blocks(student), student.transformer, options.learning_rate)
    empty = teacher.encode_text(*pool.empty_ids)

    def loss_of(batch: flow.Batch, generator: torch.Generator) -> Tensor:
        sigmas = flow.sample_sigmas(len(batch.latents), generator, options.sigma_mean)
        latents, _ = flow.noised(batch.latents, sigmas, generator)
        guidance = torch.empty_like(sigmas).uniform_(*options.guidance_range, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = teacher.encode_text(*batch.token_ids)
            with torch.no_grad():
                target = _guided(teacher, _Noised(latents, sigmas, guidance), text, empty)
            predicted = student.velocity(latents, sigmas, guidance, text)
        return (predicted.float() - target).square().mean()

    _run(space, pool, options, _Run("distilled", student, ema, optimizer, loss_of))


def guidance_embedder(network: Network) -> Any:
    """What distillation is to teach."""
    return network.transformer.get_submodule("time_text_embed.guidance_embedder")


def neutralise_guidance(network: Network) -> None:
    """Zeroes the guidance embedder's last layer, so that guidance starts without effect."""
    last = guidance_embedder(network).linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def _guided(teacher: Network, noised: _Noised, text: TextStates, empty: TextStates) -> Tensor:
    """Classifier-free guidance of the teacher; a scale of 1 is the conditional velocity."""
    neutral = torch.ones_like(noised.sigmas)
    empty = tuple(part.expand_as(like) for part, like in zip(empty, text, strict=True))
    conditional = teacher.velocity(noised.latents, noised.sigmas, neutral, text).float()
    unconditional = teacher.velocity(noised.latents, noised.sigmas, neutral, empty).float()
    scale = flow.per_sample(noised.guidance, conditional)
    return torch.lerp(unconditional, conditional, scale)


def _run(space: Workspace, pool: flow.Pool, options: FlowOptions, run: _Run) -> None:
    generator = torch.Generator().manual_seed(options.seed + workers.rank())
    batches = pool.batches(options.batch_size, options.caption_dropout, generator)
    run.optimizer.step(run.loss_of(next(batches), generator), rate=0.0)  # compiles, changes nothing
    budget, loss_mean = workers.shared_budget(options.seconds), RunningMean(0.99)
    curve: list[tuple[int, float]] = []
    while not budget.is_spent:
        loss = run.loss_of(next(batches), generator)
        run.optimizer.step(loss, budget.rate(warmup_steps=100))
        run.ema.update(run.network)
        loss_mean.add(loss.item())
        budget.tick(f"{run.phase} loss {loss_mean.value:.4f}")
        if budget.elapsed_s > (len(curve) + 1) * options.snapshot_seconds:
            curve.append((budget.steps, loss_mean.value))
            space.save(run.phase, run.ema.module)
    space.save(run.phase, run.ema.module)
    curve.append((budget.steps, loss_mean.value))
    measurements = {"steps": budget.steps, "seconds": budget.elapsed_s, "loss": loss_mean.value}
    space.record(run.phase, {**measurements, "curve": curve}, options)


def _blocks(network: Network) -> nn.Module:
    parts: Any = network.transformer
    return nn.ModuleList([*parts.transformer_blocks, *parts.single_transformer_blocks])
