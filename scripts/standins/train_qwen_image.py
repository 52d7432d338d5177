"""Trains the Qwen-Image stand-in: autoencoder, flow matching with dropped captions, decoder.

Each phase leaves its result in `--work` and is skipped when the result is there. Guidance needs
no phase of its own, because the pipeline evaluates the network with and without the caption.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import flow
import flux_model
import model_card
import phases
import qwen_autoencoder
import qwen_model
import qwen_text
import torch
from diffusers import AutoencoderKLQwenImage
from phases import FlowOptions, Workspace
from qwen_autoencoder import OneFrame
from torch import nn
from transformers import Qwen2Tokenizer


def load_autoencoder(space: Workspace) -> OneFrame:
    """The frozen autoencoder."""
    vae = AutoencoderKLQwenImage.from_pretrained(space.autoencoder_folder)
    return OneFrame(vae).eval().requires_grad_(False)


def train_autoencoder(space: Workspace, seconds: float) -> None:
    """Phase 1."""
    options = qwen_autoencoder.options(seconds)
    torch.manual_seed(options.seed)
    model = qwen_autoencoder.build(options.latent_channels)
    measurements = qwen_autoencoder.train(model, options)
    space.record_autoencoder("autoencoder", model.vae, measurements, options)


def refine_decoder(space: Workspace, seconds: float) -> None:
    """Phase 3: more time for the decoder; latents stay what they are."""
    options, model = qwen_autoencoder.options(seconds), load_autoencoder(space)
    measurements = qwen_autoencoder.refine_decoder(model, options)
    space.record_autoencoder("decoder", model.vae, measurements, options)


def _network(tokenizer: Qwen2Tokenizer, latent_channels: int) -> qwen_model.QwenNetwork:
    torch.manual_seed(7)
    network = qwen_model.QwenNetwork(tokenizer, latent_channels)
    network.fix_size()
    return network


def main() -> None:
    """Runs the phases that have not finished yet and writes the pipeline and its card."""
    seconds = {"autoencoder": 600.0, "flow": 1800.0, "decoder": 150.0}
    arguments = phases.begin(__doc__, seconds, pool=8192, batch_size=32)
    tokenizer = qwen_text.tokenizer()

    def save_pipeline(network: nn.Module) -> None:
        vae = load_autoencoder(space).vae
        qwen_model.save_pipeline(network, vae, tokenizer, arguments.output)

    space = Workspace(arguments.work, save_pipeline)
    if not space.has("autoencoder"):
        train_autoencoder(space, arguments.autoencoder_seconds)
    new_network = partial(_network, tokenizer, load_autoencoder(space).config.latent_channels)
    if not space.has("flow"):
        _train_transformer(space, tokenizer, new_network, arguments)
    if not space.has("decoder"):
        refine_decoder(space, arguments.decoder_seconds)
    space.finish(new_network(), model_card.QWEN_IMAGE, arguments.output)


def _train_transformer(
    space: Workspace,
    tokenizer: Qwen2Tokenizer,
    new_network: Callable[[], qwen_model.QwenNetwork],
    arguments: argparse.Namespace,
) -> None:
    tokenize = [partial(qwen_text.token_ids, tokenizer)]
    vae, world = load_autoencoder(space), flow.picture_world()
    pool = flow.build_pool(vae, tokenize, arguments.pool, world)
    pool = replace(pool, latents=flux_model.pack(pool.latents))
    options = FlowOptions(
        arguments.flow_seconds, batch_size=arguments.batch_size, snapshot_seconds=120
    )
    phases.train_flow(space, new_network(), pool, options)


if __name__ == "__main__":
    main()
