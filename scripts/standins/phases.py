"""What the training scripts do in the same way: begin, leave results, match flows, finish."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import flow
import model_card
import torch
import workers
from diffusers import ModelMixin
from progress import RunningMean
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

TextStates = tuple[Tensor, ...]


class Network(Protocol):
    """Text encoders and transformer of a stand-in as one `nn.Module`, so that they train together.

    The transformer's blocks are named as in FLUX.
    """

    transformer: nn.Module

    def encode_text(self, *token_ids: Tensor) -> TextStates:
        """What the transformer takes of the captions' ids, batch first."""

    def velocity(self, latents: Tensor, sigmas: Tensor, text: TextStates) -> Tensor:
        """Velocity of the latents' shape at noise levels `(B,)`, without guidance."""


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

    @property
    def autoencoder_folder(self) -> Path:
        """The autoencoder, with the refined decoder where there is one."""
        return self.folder / ("decoder" if self.has("decoder") else "autoencoder")

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

    def record_autoencoder(
        self, phase: str, model: ModelMixin, measurements: dict[str, Any], options: Any
    ) -> None:
        """Writes the autoencoder as a phase left it, and marks the phase as finished."""
        if workers.rank() == 0:
            model.save_pretrained(self.folder / phase)
        self.record(phase, measurements, options)

    def finish(self, network: nn.Module, card: model_card.Card, output: Path) -> None:
        """Writes the pipeline made of the last phase's weights into `output`, with its card."""
        if workers.rank() == 0:
            self.load(card.phases[-1], network)
            self.save_pipeline(network)
            model_card.write(card, self.folder, output)


def begin(
    description: str | None, seconds: Mapping[str, float], pool: int, batch_size: int
) -> argparse.Namespace:
    """Reads the command line, joins the workers and makes the folder of the phases' results.

    `seconds` are the phases' default budgets, each an argument `<phase>_seconds`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="folder of the phases' results")
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write")
    for phase, budget in seconds.items():
        parser.add_argument(f"--{phase}-seconds", type=float, default=budget)
    parser.add_argument("--batch-size", type=int, default=batch_size, help="of flow matching")
    parser.add_argument("--pool", type=int, default=pool, help="encoded samples kept in memory")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workers.join()
    arguments.work.mkdir(parents=True, exist_ok=True)
    return arguments


@dataclass(frozen=True)
class Run:
    """What one phase trains, and on which loss."""

    phase: str
    network: Any
    ema: flow.Ema
    optimizer: flow.Optimizer
    loss_of: Callable[[flow.Batch, torch.Generator], Tensor]


def train_flow(space: Workspace, network: Any, pool: flow.Pool, options: FlowOptions) -> None:
    """Text encoders and transformer learn the velocity, some of the time without a caption."""
    if space.has_snapshot("flow"):
        space.load("flow", network)
    ema = flow.Ema(network, options.ema_decay)
    network.transformer.compile()
    optimizer = flow.Optimizer(blocks(network), network, options.learning_rate)

    def loss_of(batch: flow.Batch, generator: torch.Generator) -> Tensor:
        sigmas = flow.sample_sigmas(len(batch.latents), generator, options.sigma_mean)
        latents, velocity = flow.noised(batch.latents, sigmas, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = network.velocity(latents, sigmas, network.encode_text(*batch.token_ids))
        return (predicted.float() - velocity).square().mean()

    run(space, pool, options, Run("flow", network, ema, optimizer, loss_of))


def blocks(network: Network) -> nn.Module:
    """The transformer's double blocks, and its single ones where it has any."""
    parts: Any = network.transformer
    single = getattr(parts, "single_transformer_blocks", ())
    return nn.ModuleList([*parts.transformer_blocks, *single])


def run(space: Workspace, pool: flow.Pool, options: FlowOptions, task: Run) -> None:
    """Trains until the time is over; snapshots on the way can be continued from."""
    generator = torch.Generator().manual_seed(options.seed + workers.rank())
    batches = pool.batches(options.batch_size, options.caption_dropout, generator)
    task.optimizer.step(task.loss_of(next(batches), generator), rate=0.0)  # compiles only
    budget, loss_mean = workers.shared_budget(options.seconds), RunningMean(0.99)
    curve: list[tuple[int, float]] = []
    while not budget.is_spent:
        loss = task.loss_of(next(batches), generator)
        task.optimizer.step(loss, budget.rate(warmup_steps=100))
        task.ema.update(task.network)
        loss_mean.add(loss.item())
        budget.tick(f"{task.phase} loss {loss_mean.value:.4f}")
        if budget.elapsed_s > (len(curve) + 1) * options.snapshot_seconds:
            curve.append((budget.steps, loss_mean.value))
            space.save(task.phase, task.ema.module)
    space.save(task.phase, task.ema.module)
    curve.append((budget.steps, loss_mean.value))
    measurements = {"steps": budget.steps, "seconds": budget.elapsed_s, "loss": loss_mean.value}
    space.record(task.phase, {**measurements, "curve": curve}, options)
