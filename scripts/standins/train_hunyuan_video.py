"""Trains the HunyuanVideo stand-in: autoencoder, flow matching, guidance distillation.

Each phase leaves its result in `--work` and is skipped when the result is there. The phases
that train the transformer share the work when started by `torch.distributed.run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import flow
import from_flux
import guided_flow
import hunyuan_video_model as model
import llama_text
import model_card
import moving_shapes
import phases
import text_models
import torch
import video_autoencoder
from diffusers import AutoencoderKLHunyuanVideo
from hunyuan_video_attention import MatmulHunyuanVideoAttention
from phases import FlowOptions, Workspace
from torch import nn

from meancache_trt.standins import video_captions

SIGMA_MEAN = 1.2
"""Of the noise levels' logits in training: between shift 3's and HunyuanVideo's 7."""

GUIDANCE_RANGE = (1.0, 7.0)
"""Includes 6, the scale of `HunyuanVideoPipeline`."""


def train_autoencoder(space: Workspace, seconds: float) -> None:
    """Phase 1."""
    options = video_autoencoder.options(seconds)
    torch.manual_seed(options.seed)
    network = video_autoencoder.build()
    measurements = video_autoencoder.train(network, options)
    space.record_autoencoder("autoencoder", network, measurements, options)


def load_autoencoder(space: Workspace) -> AutoencoderKLHunyuanVideo:
    """The frozen autoencoder."""
    network = AutoencoderKLHunyuanVideo.from_pretrained(space.autoencoder_folder)
    return network.eval().requires_grad_(False)


def build_pool(
    vae: AutoencoderKLHunyuanVideo, tokenizers: model.Tokenizers, size: int
) -> flow.Pool:
    """This worker's share of `size` encoded and captioned training videos."""
    tokenize = (
        partial(text_models.token_ids, tokenizers.clip),
        partial(llama_text.token_ids, tokenizers.llama),
    )
    world = flow.World(
        video_captions.training_scenes(), moving_shapes.videos, video_captions.random_caption
    )
    return flow.build_pool(vae, tokenize, size, world)


def _network(tokenizers: model.Tokenizers, latent_channels: int) -> model.HunyuanVideoNetwork:
    torch.manual_seed(7)
    network = model.HunyuanVideoNetwork(tokenizers, latent_channels)
    for block in (
        *network.transformer.transformer_blocks,
        *network.transformer.single_transformer_blocks,
    ):
        block.attn.set_processor(MatmulHunyuanVideoAttention())
    return network


def main() -> None:
    """Runs the phases that have not finished yet and writes the pipeline and its card."""
    seconds = {"autoencoder": 500.0, "flow": 900.0, "distil": 270.0}
    arguments = phases.begin(__doc__, seconds, pool=5120, batch_size=32)
    tokenizers = model.tokenizers()

    def save_pipeline(network: nn.Module) -> None:
        model.save_pipeline(network, load_autoencoder(space), tokenizers, arguments.output)

    space = Workspace(arguments.work, save_pipeline)
    if not space.has("autoencoder"):
        train_autoencoder(space, arguments.autoencoder_seconds)
    new_network = partial(_network, tokenizers, load_autoencoder(space).config.latent_channels)
    if not space.has("distilled"):
        _train_transformer(space, tokenizers, new_network, arguments)
    space.finish(new_network(), model_card.HUNYUAN_VIDEO, arguments.output)


def _train_transformer(
    space: Workspace,
    tokenizers: model.Tokenizers,
    new_network: Callable[[], model.HunyuanVideoNetwork],
    arguments: argparse.Namespace,
) -> None:
    pool = build_pool(load_autoencoder(space), tokenizers, arguments.pool)
    flow_matching = FlowOptions(
        arguments.flow_seconds,
        batch_size=arguments.batch_size,
        learning_rate=1e-3,
        sigma_mean=SIGMA_MEAN,
        guidance_range=GUIDANCE_RANGE,
    )
    if not space.has("flow"):
        network = new_network()
        from_flux.start(network, tokenizers)
        guided_flow.train_flow(space, network, pool, flow_matching)
    distillation = replace(flow_matching, seconds=arguments.distil_seconds, caption_dropout=0.0)
    guided_flow.distil_guidance(space, new_network, pool, distillation)


if __name__ == "__main__":
    main()
