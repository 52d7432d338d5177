"""Tiny random HunyuanVideo pipelines."""

from __future__ import annotations

import string

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import LlamaConfig, LlamaModel, LlamaTokenizerFast

from tests.export.tiny_flux import randomize, tiny_clip


def tiny_transformer(*, has_guidance: bool = True) -> HunyuanVideoTransformer3DModel:
    network = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=has_guidance,
        text_embed_dim=48,
        pooled_projection_dim=40,
        rope_axes_dim=(8, 12, 12),
    )
    randomize(network, seed=1)
    return network.eval()


def tiny_vae() -> AutoencoderKLHunyuanVideo:
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )
    randomize(vae, seed=2)
    return vae.eval()


def tiny_llama() -> tuple[LlamaTokenizerFast, LlamaModel]:
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *string.printable, "▁"])}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
    )
    tokenizer = LlamaTokenizerFast(
        vocab=vocabulary, merges=[], pad_token="<unk>", padding_side="right"
    )
    return tokenizer, LlamaModel(config).eval()


def tiny_pipeline(*, has_guidance: bool = True) -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_llama()
    tokenizer_2, text_encoder_2 = tiny_clip(77)  # what the pipeline pads to
    return HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=tiny_transformer(has_guidance=has_guidance),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )
