"""Trains the HunyuanVideo stand-in: autoencoder, flow matching, guidance distillation.

Each phase leaves its result in `--work` and is skipped when the result is there. The phases
that train the transformer share the work when started by `torch.distributed.run`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import flow
import from_flux
import guided_flow
import hunyuan_video_model as model
import llama_text
import model_card
import moving_shapes
import text_models
import torch
import video_autoencoder
import workers
from diffusers import AutoencoderKLHunyuanVideo
from guided_flow import FlowOptions, Workspace
from hunyuan_video_attention import MatmulHunyuanVideoAttention
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
    if workers.rank() == 0:
        network.save_pretrained(space.folder / "autoencoder")
    space.record("autoencoder", measurements, options)


def load_autoencoder(space: Workspace) -> AutoencoderKLHunyuanVideo:
    """The frozen autoencoder of phase 1."""
    network = AutoencoderKLHunyuanVideo.from_pretrained(space.folder / "autoencoder")
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
    share, seed = size // workers.count(), 5 + workers.rank()
    return flow.build_pool(vae, tokenize, share, seed, world)


def _network(tokenizers: model.Tokenizers, latent_channels: int) -> model.HunyuanVideoNetwork:
    torch.manual_seed(7)
    network = model.HunyuanVideoNetwork(tokenizers, latent_channels)
    for block in (
        *network.transformer.transformer_blocks,
        *network.transformer.single_transformer_blocks,
    ):
        block.attn.set_processor(MatmulHunyuanVideoAttention())
    return network


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the phases' results")
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--autoencoder-seconds", type=float, default=500)
    parser.add_argument("--flow-seconds", type=float, default=900)
    parser.add_argument("--distil-seconds", type=float, default=270)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pool", type=int, default=5120, help="videos kept in memory")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Runs the phases that have not finished yet and writes the pipeline and its card."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    workers.join()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizers = model.tokenizers()

    def save_pipeline(network: nn.Module) -> None:
        model.save_pipeline(network, load_autoencoder(space), tokenizers, arguments.output)

    space = Workspace(arguments.work, save_pipeline)
    if not space.has("autoencoder"):
        train_autoencoder(space, arguments.autoencoder_seconds)
    if not space.has("distilled"):
        _train_transformer(space, tokenizers, arguments)
    if workers.rank() == 0:
        network = _network(tokenizers, load_autoencoder(space).config.latent_channels)
        space.load("distilled", network)
        space.save_pipeline(network)
        model_card.write(model_card.HUNYUAN_VIDEO, arguments.work, arguments.output)


def _train_transformer(
    space: Workspace, tokenizers: model.Tokenizers, arguments: argparse.Namespace
) -> None:
    vae = load_autoencoder(space)
    pool = build_pool(vae, tokenizers, arguments.pool)
    print("pool ready", flush=True)
    new_network = partial(_network, tokenizers, vae.config.latent_channels)
    common = {
        "learning_rate": 1e-3,
        "batch_size": arguments.batch_size,
        "sigma_mean": SIGMA_MEAN,
        "guidance_range": GUIDANCE_RANGE,
    }
    if not space.has("flow"):
        network = new_network()
        from_flux.start(network, tokenizers)
        options = FlowOptions(arguments.flow_seconds, **common)
        guided_flow.train_flow(space, network, pool, options)
    distillation = FlowOptions(arguments.distil_seconds, caption_dropout=0.0, **common)
    guided_flow.distil_guidance(space, new_network, pool, distillation)


if __name__ == "__main__":
    main()
