"""Tiny random Wan pipelines: 2.1, 2.2 A14B with two transformers, and 2.2 TI2V-5B."""

from __future__ import annotations

import string

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from tests.export.tiny_flux import randomize

FEATURES = 48
CHANNELS = 4


def tiny_transformer(*, channels: int = CHANNELS, seed: int = 1) -> WanTransformer3DModel:
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        text_dim=FEATURES,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    randomize(network, seed=seed)
    return network.eval()


def tiny_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[-0.7, 0.1, 0.4, -0.2],
        latents_std=[2.8, 1.4, 2.3, 0.9],
    )
    return _sized(vae)


def tiny_vae_5b() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[-0.7, 0.1, 0.4, -0.2],
        latents_std=[2.8, 1.4, 2.3, 0.9],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    return _sized(vae)


def _sized(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """One that names its sizes, as a small model does."""
    vae.register_to_config(_sample_size=32, _sample_frames=9)
    randomize(vae, seed=2)
    return vae.eval()


def tiny_umt5() -> tuple[T5TokenizerFast, UMT5EncoderModel]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.printable]
    vocabulary = [
        (piece, 0.0 if piece.startswith("<") else -1.0) for piece in dict.fromkeys(pieces)
    ]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=FEATURES,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_heads=2,
    )
    torch.manual_seed(0)
    return tokenizer, UMT5EncoderModel(config).eval()


def unipc(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )


def tiny_pipeline() -> WanPipeline:
    return _pipeline(transformer=tiny_transformer(), vae=tiny_vae())


def tiny_a14b() -> WanPipeline:
    """Two transformers; the second is called below 0.875 of the timesteps."""
    return _pipeline(
        transformer=tiny_transformer(),
        vae=tiny_vae(),
        transformer_2=tiny_transformer(seed=7),
        boundary_ratio=0.875,
    )


def tiny_5b() -> WanPipeline:
    return _pipeline(transformer=tiny_transformer(), vae=tiny_vae_5b(), expand_timesteps=True)


def _pipeline(
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    transformer_2: WanTransformer3DModel | None = None,
    boundary_ratio: float | None = None,
    *,
    expand_timesteps: bool = False,
) -> WanPipeline:
    tokenizer, text_encoder = tiny_umt5()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=unipc(),
        transformer=transformer,
        transformer_2=transformer_2,
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
