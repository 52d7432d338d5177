"""Tiny random FLUX.1 pipelines."""

from __future__ import annotations

import math
import string

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TEXT_TOKENS = 12


def randomize(module: nn.Module, seed: int) -> None:
    """Give every parameter a value, since diffusers starts many at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 0.8 / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.05 * noise + ("norm" in name and name.endswith("weight")))


def tiny_transformer(*, has_guidance: bool = True) -> FluxTransformer2DModel:
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=40,
        guidance_embeds=has_guidance,
        axes_dims_rope=(8, 12, 12),
    )
    randomize(network, seed=1)
    return network.eval()


def tiny_vae(latent_channels: int = 4) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    randomize(vae, seed=2)
    return vae.eval()


def tiny_clip(text_tokens: int = 16) -> tuple[CLIPTokenizer, CLIPTextModel]:
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=40,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=text_tokens,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=text_tokens)
    return tokenizer, CLIPTextModel(config).eval()


def tiny_t5() -> tuple[T5TokenizerFast, T5EncoderModel]:
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary = [*specials, *((letter, -3.0) for letter in string.ascii_lowercase)]
    config = T5Config(
        vocab_size=len(vocabulary), d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_TOKENS)
    return tokenizer, T5EncoderModel(config).eval()


def tiny_pipeline(*, has_guidance: bool = True) -> FluxPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_clip()
    tokenizer_2, text_encoder_2 = tiny_t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=tiny_transformer(has_guidance=has_guidance),
    )
