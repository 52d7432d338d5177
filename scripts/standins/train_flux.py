"""Trains the FLUX.1-dev stand-in: autoencoder, decoder, flow matching, guidance distillation.

Each phase leaves its result in `--work` and is skipped when the result is there. The phases
that train the transformer share the work when started by `torch.distributed.run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import autoencoder as autoencoder_phase
import flow
import flux_model
import guided_flow
import model_card
import phases
import text_models
import torch
from diffusers import AutoencoderKL
from flux_attention import MatmulFluxAttention
from phases import FlowOptions, Workspace
from torch import nn


def load_autoencoder(space: Workspace) -> AutoencoderKL:
    """The frozen autoencoder."""
    return AutoencoderKL.from_pretrained(space.autoencoder_folder).eval().requires_grad_(False)


def train_autoencoder(space: Workspace, options: autoencoder_phase.AutoencoderOptions) -> None:
    """Phase 1."""
    torch.manual_seed(options.seed)
    model = autoencoder_phase.build(options.latent_channels)
    measurements = autoencoder_phase.train(model, options)
    space.record_autoencoder("autoencoder", model, measurements, options)


def refine_decoder(space: Workspace, options: autoencoder_phase.AutoencoderOptions) -> None:
    """Phase 1b: more time for the decoder; latents stay what they are."""
    model = load_autoencoder(space)
    measurements = autoencoder_phase.refine_decoder(model, options)
    space.record_autoencoder("decoder", model, measurements, options)


def _network(tokenizers: flux_model.Tokenizers, latent_channels: int) -> flux_model.FluxNetwork:
    torch.manual_seed(7)
    network = flux_model.FluxNetwork(tokenizers, latent_channels)
    network.transformer.set_attn_processor(MatmulFluxAttention())
    guided_flow.neutralise_guidance(network)
    return network


def main() -> None:
    """Runs the phases that have not finished yet and writes the pipeline and its card."""
    seconds = {"autoencoder": 440.0, "decoder": 360.0, "flow": 2300.0, "distil": 800.0}
    arguments = phases.begin(__doc__, seconds, pool=24_576, batch_size=48)
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
    space.finish(new_network(), model_card.FLUX, arguments.output)


def _train_transformer(
    space: Workspace,
    tokenizers: flux_model.Tokenizers,
    new_network: Callable[[], flux_model.FluxNetwork],
    arguments: argparse.Namespace,
) -> None:
    tokenize = [partial(text_models.token_ids, part) for part in (tokenizers.clip, tokenizers.t5)]
    vae, world = load_autoencoder(space), flow.picture_world()
    pool = flow.build_pool(vae, tokenize, arguments.pool, world)
    pool = replace(pool, latents=flux_model.pack(pool.latents))
    flow_matching = FlowOptions(arguments.flow_seconds, batch_size=arguments.batch_size)
    if not space.has("flow"):
        guided_flow.train_flow(space, new_network(), pool, flow_matching)
    distillation = replace(
        flow_matching, seconds=arguments.distil_seconds, learning_rate=1e-3, caption_dropout=0.0
    )
    guided_flow.distil_guidance(space, new_network, pool, distillation)


if __name__ == "__main__":
    main()
