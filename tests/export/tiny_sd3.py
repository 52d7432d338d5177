"""Tiny random Stable Diffusion 3.5 pipelines: dual attention, normed queries, three encoders."""

from __future__ import annotations

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tests.export.tiny_flux import randomize, tiny_clip, tiny_t5, tiny_vae

CHANNELS = 16  # StableDiffusion3InpaintPipeline takes no other number
CLIP_TOKENS, FEATURES, POOLED = 16, 48, 40
TABLE_SIDE = 24  # tokens


def tiny_transformer(
    *, dual_attention: tuple[int, ...] = (0,), qk_norm: str | None = "rms_norm"
) -> SD3Transformer2DModel:
    """As SD3.5-medium; without dual attention as SD3.5-large, without norms as SD3-medium."""
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        caption_projection_dim=64,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=TABLE_SIDE,
        dual_attention_layers=dual_attention,
        qk_norm=qk_norm,
    )
    randomize(network, seed=1)
    # A table that is no more what the class computes: it is the checkpoint's.
    network.pos_embed.pos_embed += 0.1 * torch.randn(
        network.pos_embed.pos_embed.shape, generator=torch.Generator().manual_seed(4)
    )
    return network.eval()


def tiny_projected_clip(seed: int) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    """Half of the pooled features, of as narrow a network."""
    tokenizer, unprojected = tiny_clip(CLIP_TOKENS)
    config = CLIPTextConfig(
        **{
            **unprojected.config.to_dict(),
            "hidden_size": POOLED // 2,
            "projection_dim": POOLED // 2,
            "num_hidden_layers": 2,
        }
    )
    encoder = CLIPTextModelWithProjection(config)
    randomize(encoder, seed)
    return tokenizer, encoder.eval()


def tiny_pipeline(
    *, dual_attention: tuple[int, ...] = (0,), qk_norm: str | None = "rms_norm"
) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_projected_clip(5)
    tokenizer_2, text_encoder_2 = tiny_projected_clip(6)
    tokenizer_3, text_encoder_3 = tiny_t5()
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(CHANNELS),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        transformer=tiny_transformer(dual_attention=dual_attention, qk_norm=qk_norm),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
