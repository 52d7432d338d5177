"""Trains the Qwen-Image stand-in: autoencoder, decoder, flow matching with dropped captions.

Each phase leaves its result in `--work` and is skipped when the result is there. Guidance needs
no phase of its own, because the pipeline evaluates the network with and without the caption.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import autoencoder as autoencoder_phase
import flow
import flux_model
import model_card
import qwen_autoencoder
import qwen_model
import qwen_text
import torch
import workers
from autoencoder import pictures
from diffusers import AutoencoderKLQwenImage
from qwen_autoencoder import OneFrame
from train_flux import FlowOptions, Run, Workspace, run_phase
from transformers import Qwen2Tokenizer

from meancache_trt.standins.captions import all_scenes

KL_WEIGHT = 5e-5
"""At the other stand-ins' 5e-4 a latent channel collapsed, and colours with it."""


@dataclass(frozen=True)
class QwenWorkspace(Workspace):
    """Where the phases leave their results."""

    tokenizers: Qwen2Tokenizer

    def autoencoder(self) -> OneFrame:
        """The frozen autoencoder, with the refined decoder where there is one."""
        name = "decoder" if self.has("decoder") else "autoencoder"
        model = AutoencoderKLQwenImage.from_pretrained(self.folder / name)
        return OneFrame(model).eval().requires_grad_(False)

    def save_autoencoder(self, phase: str, model: OneFrame) -> None:
        """Writes the autoencoder as a phase left it."""
        super().save_autoencoder(phase, model.vae)

    def write_pipeline(self, network: qwen_model.QwenNetwork) -> None:
        """Writes the pipeline made of a network, which is in half precision afterwards."""
        qwen_model.save_pipeline(network, self.autoencoder().vae, self.tokenizers, self.output)


def train_autoencoder(space: QwenWorkspace, options: autoencoder_phase.AutoencoderOptions) -> None:
    """Phase 1."""
    torch.manual_seed(options.seed)
    model = OneFrame(qwen_autoencoder.build(options.latent_channels))
    model.vae.encoder.compile()
    model.vae.decoder.compile()
    measurements = autoencoder_phase.train(model, options)
    generator = torch.Generator().manual_seed(2)
    with torch.compiler.set_stance("force_eager"):
        model.normalise_channels(next(pictures(all_scenes(), 512, generator))[1])
    space.save_autoencoder("autoencoder", model)
    space.record("autoencoder", measurements, options)


def refine_decoder(space: QwenWorkspace, options: autoencoder_phase.AutoencoderOptions) -> None:
    """Phase 1b: more time for the decoder; latents stay what they are."""
    model = space.autoencoder()
    model.vae.decoder.compile()
    measurements = autoencoder_phase.refine_decoder(model, options)
    space.save_autoencoder("decoder", model)
    space.record("decoder", measurements, options)


def train_flow(space: QwenWorkspace, pool: flow.Pool, options: FlowOptions) -> None:
    """Phase 2: text encoder and transformer learn the velocity, some of the time uncaptioned."""
    network = _network(space)
    if space.has_snapshot("flow"):
        space.load("flow", network)
    ema = flow.Ema(network, options.ema_decay)
    network.fix_size()
    network.transformer.compile()
    blocks = network.transformer.transformer_blocks
    optimizer = flow.Optimizer(blocks, network, options.learning_rate)

    def loss_of(batch: flow.Batch, generator: torch.Generator) -> torch.Tensor:
        sigmas = flow.sample_sigmas(len(batch.latents), generator)
        latents, velocity = flow.noised(batch.latents, sigmas, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = network.encode_text(*batch.token_ids)
            predicted = network.velocity(latents, sigmas, text)
        return (predicted.float() - velocity).square().mean()

    run_phase(space, pool, options, Run("flow", network, ema, optimizer, loss_of))


def _network(space: QwenWorkspace) -> qwen_model.QwenNetwork:
    torch.manual_seed(7)
    latent_channels = space.autoencoder().vae.config.z_dim
    return qwen_model.QwenNetwork(space.tokenizers, latent_channels)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the phases' results")
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--autoencoder-seconds", type=float, default=600)
    parser.add_argument("--decoder-seconds", type=float, default=150)
    parser.add_argument("--flow-seconds", type=float, default=1800)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pool", type=int, default=8192, help="pictures kept in memory")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Runs the phases that have not finished yet and writes the pipeline and its card."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    workers.join()
    arguments.work.mkdir(parents=True, exist_ok=True)
    space = QwenWorkspace(arguments.work, arguments.output, qwen_text.tokenizer())
    options = autoencoder_phase.AutoencoderOptions(kl_weight=KL_WEIGHT)
    if not space.has("autoencoder"):
        train_autoencoder(space, replace(options, seconds=arguments.autoencoder_seconds))
    if not space.has("flow"):
        _train_transformer(space, arguments)
    if not space.has("decoder"):
        refine_decoder(space, replace(options, seconds=arguments.decoder_seconds))
    if workers.rank() == 0:
        network = _network(space)
        space.load("flow", network)
        space.write_pipeline(network)
        model_card.write(arguments.work, arguments.output, model_card.QWEN_IMAGE)


def _train_transformer(space: QwenWorkspace, arguments: argparse.Namespace) -> None:
    tokenize = [partial(qwen_text.token_ids, space.tokenizers)]
    size, seed = arguments.pool // workers.count(), 5 + workers.rank()
    pool = flow.build_pool(space.autoencoder(), tokenize, flux_model.pack, size, seed)
    print("pool ready", flush=True)
    options = FlowOptions(
        arguments.flow_seconds, batch_size=arguments.batch_size, snapshot_seconds=120
    )
    train_flow(space, pool, options)


if __name__ == "__main__":
    main()
