"""Trains the FLUX.1-dev stand-in: autoencoder, decoder, flow matching, guidance distillation.

Each phase leaves its result in `--work` and is skipped when the result is there. The phases
that train the transformer share the work when started by `torch.distributed.run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import autoencoder as autoencoder_phase
import flow
import flux_model
import guided_flow
import model_card
import text_models
import torch
import workers
from diffusers import AutoencoderKL
from flux_attention import MatmulFluxAttention
from guided_flow import FlowOptions, Workspace
from torch import nn


def load_autoencoder(space: Workspace) -> AutoencoderKL:
    """The frozen autoencoder, with the refined decoder where there is one."""
    name = "decoder" if space.has("decoder") else "autoencoder"
    model = AutoencoderKL.from_pretrained(space.folder / name)
    return model.eval().requires_grad_(False)


def train_autoencoder(space: Workspace, options: autoencoder_phase.AutoencoderOptions) -> None:
    """Phase 1."""
    torch.manual_seed(options.seed)
    model = autoencoder_phase.build(options.latent_channels)
    measurements = autoencoder_phase.train(model, options)
    _save_autoencoder(space, "autoencoder", model)
    space.record("autoencoder", measurements, options)


def refine_decoder(space: Workspace, options: autoencoder_phase.AutoencoderOptions) -> None:
    """Phase 1b: more time for the decoder; latents stay what they are."""
    model = load_autoencoder(space)
    measurements = autoencoder_phase.refine_decoder(model, options)
    _save_autoencoder(space, "decoder", model)
    space.record("decoder", measurements, options)


def _save_autoencoder(space: Workspace, phase: str, model: AutoencoderKL) -> None:
    if workers.rank() == 0:
        model.save_pretrained(space.folder / phase)


def _network(tokenizers: flux_model.Tokenizers, latent_channels: int) -> flux_model.FluxNetwork:
    torch.manual_seed(7)
    network = flux_model.FluxNetwork(tokenizers, latent_channels)
    network.transformer.set_attn_processor(MatmulFluxAttention())
    guided_flow.neutralise_guidance(network)
    return network


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

    def save_pipeline(network: nn.Module) -> None:
        flux_model.save_pipeline(network, load_autoencoder(space), tokenizers, arguments.output)

    space = Workspace(arguments.work, save_pipeline)
    if not space.has("autoencoder"):
        options = autoencoder_phase.AutoencoderOptions(seconds=arguments.autoencoder_seconds)
        train_autoencoder(space, options)
    if not space.has("decoder"):
        options = autoencoder_phase.AutoencoderOptions(seconds=arguments.decoder_seconds)
        refine_decoder(space, options)
    new_network = partial(_network, tokenizers, load_autoencoder(space).config.latent_channels)
    if not space.has("distilled"):
        _train_transformer(space, tokenizers, new_network, arguments)
    if workers.rank() == 0:
        network = new_network()
        space.load("distilled", network)
        space.save_pipeline(network)
        model_card.write(model_card.FLUX, arguments.work, arguments.output)


def _train_transformer(
    space: Workspace,
    tokenizers: flux_model.Tokenizers,
    new_network: Callable[[], flux_model.FluxNetwork],
    arguments: argparse.Namespace,
) -> None:
    tokenize = [partial(text_models.token_ids, part) for part in (tokenizers.clip, tokenizers.t5)]
    size, seed = arguments.pool // workers.count(), 5 + workers.rank()
    pool = flow.build_pool(load_autoencoder(space), tokenize, size, seed, flow.picture_world())
    pool = replace(pool, latents=flux_model.pack(pool.latents))
    print("pool ready", flush=True)
    if not space.has("flow"):
        guided_flow.train_flow(space, new_network(), pool, FlowOptions(arguments.flow_seconds))
    distillation = FlowOptions(arguments.distil_seconds, learning_rate=1e-3, caption_dropout=0.0)
    guided_flow.distil_guidance(space, new_network, pool, distillation)


if __name__ == "__main__":
    main()
