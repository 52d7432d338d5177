"""Phases of the guidance-distilled stand-ins: flow matching, then the guidance embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import flow
import phases
import torch
from phases import FlowOptions, TextStates, Workspace
from torch import Tensor, nn


class Network(phases.Network, Protocol):
    """One whose transformer has a guidance embedder, named as in FLUX."""

    text_encoders: tuple[nn.Module, ...]

    def velocity(
        self, latents: Tensor, sigmas: Tensor, text: TextStates, guidance: Tensor | None = None
    ) -> Tensor:
        """Velocity at noise levels `(B,)` under guidance scales `(B,)`, which are 1 by default."""


@dataclass(frozen=True)
class _Noised:
    """Inputs of one velocity evaluation: latents, noise levels and scales `(B,)`."""

    latents: Tensor
    sigmas: Tensor
    guidance: Tensor


def train_flow(space: Workspace, network: Any, pool: flow.Pool, options: FlowOptions) -> None:
    """Text encoders and transformer learn the velocity, all at a guidance scale of 1."""
    guidance_embedder(network).requires_grad_(False)
    phases.train_flow(space, network, pool, options)


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
    optimizer = flow.Optimizer(phases.blocks(student), student.transformer, options.learning_rate)
    empty = teacher.encode_text(*pool.empty_ids)

    def loss_of(batch: flow.Batch, generator: torch.Generator) -> Tensor:
        sigmas = flow.sample_sigmas(len(batch.latents), generator, options.sigma_mean)
        latents, _ = flow.noised(batch.latents, sigmas, generator)
        guidance = torch.empty_like(sigmas).uniform_(*options.guidance_range, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = teacher.encode_text(*batch.token_ids)
            with torch.no_grad():
                target = _guided(teacher, _Noised(latents, sigmas, guidance), text, empty)
            predicted = student.velocity(latents, sigmas, text, guidance)
        return (predicted.float() - target).square().mean()

    phases.run(space, pool, options, phases.Run("distilled", student, ema, optimizer, loss_of))


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
    empty = tuple(part.expand_as(like) for part, like in zip(empty, text, strict=True))
    conditional = teacher.velocity(noised.latents, noised.sigmas, text).float()
    unconditional = teacher.velocity(noised.latents, noised.sigmas, empty).float()
    scale = flow.per_sample(noised.guidance, conditional)
    return torch.lerp(unconditional, conditional, scale)
