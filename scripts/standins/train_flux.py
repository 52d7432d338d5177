"""Trains the FLUX.1-dev stand-in: autoencoder, decoder, flow matching, guidance distillation.

Each phase leaves its result in `--work` and is skipped when the result is there. The phases
that train the transformer share the work when started by `torch.distributed.run`.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import autoencoder as autoencoder_phase
import flow
import flux_model
import model_card
import text_models
import torch
import workers
from diffusers import AutoencoderKL
from flux_attention import MatmulFluxAttention
from progress import RunningMean
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

TextStates = tuple[Tensor, Tensor]
GUIDANCE_RANGE = (1.0, 6.0)


@dataclass(frozen=True)
class FlowOptions:
    """Options of a phase that trains the transformer."""

    seconds: float
    batch_size: int = 48
    learning_rate: float = 1.5e-3
    caption_dropout: float = 0.12
    ema_decay: float = 0.999
    snapshot_seconds: float = 300
    seed: int = 11


@dataclass(frozen=True)
class Workspace:
    """Where the phases leave their results."""

    folder: Path
    output: Path
    tokenizers: flux_model.Tokenizers

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

    def autoencoder(self) -> AutoencoderKL:
        """The frozen autoencoder, with the refined decoder where there is one."""
        name = "decoder" if self.has("decoder") else "autoencoder"
        model = AutoencoderKL.from_pretrained(self.folder / name)
        return model.eval().requires_grad_(False)

    def save_autoencoder(self, phase: str, model: AutoencoderKL) -> None:
        """Writes the autoencoder as a phase left it."""
        if workers.rank() == 0:
            model.save_pretrained(self.folder / phase)

    def load(self, phase: str, network: flux_model.FluxNetwork) -> None:
        """Reads a phase's averaged weights into the network."""
        load_model(network, self.folder / f"{phase}.safetensors")

    def save(self, phase: str, network: flux_model.FluxNetwork) -> None:
        """Writes a phase's averaged weights, and the pipeline made of them."""
        if workers.rank() != 0:
            return
        save_model(network, self.folder / f"{phase}.safetensors")
        self.write_pipeline(copy.deepcopy(network))

    def write_pipeline(self, network: flux_model.FluxNetwork) -> None:
        """Writes the pipeline made of a network, which is in half precision afterwards."""
        flux_model.save_pipeline(network, self.autoencoder(), self.tokenizers, self.output)


@dataclass(frozen=True)
class Noised:
    """Inputs of one velocity evaluation: latents `(B, 64, 4 C)`, noise levels and scales `(B,)`."""

    latents: Tensor
    sigmas: Tensor
    guidance: Tensor


@dataclass(frozen=True)
class Run:
    """What one phase trains, and on which loss."""

    phase: str
    network: flux_model.FluxNetwork
    ema: flow.Ema
    optimizer: flow.Optimizer
    loss_of: Callable[[flow.Batch, torch.Generator], Tensor]


def train_autoencoder(space: Workspace, options: autoencoder_phase.AutoencoderOptions) -> None:
    """Phase 1."""
    torch.manual_seed(options.seed)
    model = autoencoder_phase.build(options.latent_channels)
    measurements = autoencoder_phase.train(model, options)
    space.save_autoencoder("autoencoder", model)
    space.record("autoencoder", measurements, options)


def refine_decoder(space: Workspace, options: autoencoder_phase.AutoencoderOptions) -> None:
    """Phase 1b: more time for the decoder; latents stay what they are."""
    model = space.autoencoder()
    measurements = autoencoder_phase.refine_decoder(model, options)
    space.save_autoencoder("decoder", model)
    space.record("decoder", measurements, options)


def train_flow(space: Workspace, pool: flow.Pool, options: FlowOptions) -> None:
    """Phase 2: text encoders and transformer learn the velocity; guidance has no effect."""
    network = _network(space)
    _neutral_guidance(network).requires_grad_(False)
    if space.has_snapshot("flow"):
        space.load("flow", network)
    ema = flow.Ema(network, options.ema_decay)
    network.transformer.compile()
    optimizer = flow.Optimizer(_blocks(network), network, options.learning_rate)

    def loss_of(batch: flow.Batch, generator: torch.Generator) -> Tensor:
        sigmas = flow.sample_sigmas(len(batch.latents), generator)
        latents, velocity = flow.noised(batch.latents, sigmas, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = network.encode_text(*batch.token_ids)
            predicted = network.velocity(latents, sigmas, torch.ones_like(sigmas), text)
        return (predicted.float() - velocity).square().mean()

    run_phase(space, pool, options, Run("flow", network, ema, optimizer, loss_of))


def distil_guidance(space: Workspace, pool: flow.Pool, options: FlowOptions) -> None:
    """Phase 3: the guidance embedding learns v_u + g (v_c - v_u) of the frozen phase-2 model."""
    teacher, student = _network(space), _network(space)
    for network in (teacher, student):
        space.load("flow", network)
    teacher.requires_grad_(False).eval().transformer.compile()
    for encoder in (student.clip, student.t5):
        encoder.requires_grad_(False)
    ema = flow.Ema(student, options.ema_decay)
    student.transformer.compile()
    optimizer = flow.Optimizer(_blocks(student), student.transformer, options.learning_rate)
    empty = teacher.encode_text(*pool.empty_ids)

    def loss_of(batch: flow.Batch, generator: torch.Generator) -> Tensor:
        sigmas = flow.sample_sigmas(len(batch.latents), generator)
        latents, _ = flow.noised(batch.latents, sigmas, generator)
        guidance = torch.empty_like(sigmas).uniform_(*GUIDANCE_RANGE, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = teacher.encode_text(*batch.token_ids)
            with torch.no_grad():
                target = _guided(teacher, Noised(latents, sigmas, guidance), text, empty)
            predicted = student.velocity(latents, sigmas, guidance, text)
        return (predicted.float() - target).square().mean()

    run_phase(space, pool, options, Run("distilled", student, ema, optimizer, loss_of))


def _guided(
    teacher: flux_model.FluxNetwork, noised: Noised, text: TextStates, empty: TextStates
) -> Tensor:
    """Classifier-free guidance of the teacher; a scale of 1 is the conditional velocity."""
    neutral = torch.ones_like(noised.sigmas)
    empty = (empty[0].expand_as(text[0]), empty[1].expand_as(text[1]))
    conditional = teacher.velocity(noised.latents, noised.sigmas, neutral, text).float()
    unconditional = teacher.velocity(noised.latents, noised.sigmas, neutral, empty).float()
    return torch.lerp(unconditional, conditional, noised.guidance.view(-1, 1, 1))


def run_phase(space: Workspace, pool: flow.Pool, options: FlowOptions, run: Run) -> None:
    """Trains until the time is over; snapshots on the way can be continued from."""
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


def _network(space: Workspace) -> flux_model.FluxNetwork:
    torch.manual_seed(7)
    latent_channels = space.autoencoder().config.latent_channels
    network = flux_model.FluxNetwork(space.tokenizers, latent_channels)
    network.transformer.set_attn_processor(MatmulFluxAttention())
    return network


def _neutral_guidance(network: flux_model.FluxNetwork) -> nn.Module:
    """The guidance embedder, its last layer zeroed so that guidance starts without effect."""
    embedder = network.transformer.time_text_embed.guidance_embedder
    nn.init.zeros_(embedder.linear_2.weight)
    nn.init.zeros_(embedder.linear_2.bias)
    return embedder


def _blocks(network: flux_model.FluxNetwork) -> nn.Module:
    parts = network.transformer
    return nn.ModuleList([*parts.transformer_blocks, *parts.single_transformer_blocks])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the phases' results")
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--autoencoder-seconds", type=float, default=440)
    parser.add_argument("--decoder-seconds", type=float, default=360)
    parser.add_argument("--flow-seconds", type=float, default=2300)
    parser.add_argument("--distil-seconds", type=float, default=800)
    parser.add_argument("--pool", type=int, default=24_576, help="pictures kept in memory")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Runs the phases that have not finished yet and writes the pipeline and its card."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    workers.join()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizers = flux_model.Tokenizers(text_models.clip_tokenizer(), text_models.t5_tokenizer())
    space = Workspace(arguments.work, arguments.output, tokenizers)
    if not space.has("autoencoder"):
        options = autoencoder_phase.AutoencoderOptions(seconds=arguments.autoencoder_seconds)
        train_autoencoder(space, options)
    if not space.has("decoder"):
        options = autoencoder_phase.AutoencoderOptions(seconds=arguments.decoder_seconds)
        refine_decoder(space, options)
    if not space.has("distilled"):
        _train_transformer(space, arguments)
    if workers.rank() == 0:
        _export(space)
        model_card.write(arguments.work, arguments.output)


def _train_transformer(space: Workspace, arguments: argparse.Namespace) -> None:
    tokenize = [
        partial(text_models.token_ids, tokenizer)
        for tokenizer in (space.tokenizers.clip, space.tokenizers.t5)
    ]
    size, seed = arguments.pool // workers.count(), 5 + workers.rank()
    pool = flow.build_pool(space.autoencoder(), tokenize, flux_model.pack, size, seed)
    print("pool ready", flush=True)
    if not space.has("flow"):
        train_flow(space, pool, FlowOptions(arguments.flow_seconds))
    distillation = FlowOptions(arguments.distil_seconds, learning_rate=1e-3, caption_dropout=0.0)
    distil_guidance(space, pool, distillation)


def _export(space: Workspace) -> None:
    network = _network(space)
    space.load("distilled", network)
    space.write_pipeline(network)


if __name__ == "__main__":
    main()
