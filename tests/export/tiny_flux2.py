"""Tiny random FLUX.2 pipelines."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Tokenizer,
)

from tests.export.tiny_flux import randomize

CHANNELS = 16  # of the packed latent
FEATURES = 48  # of three layers

# The user's message alone: Flux2Pipeline's system message would fill a tiny text.
_TEMPLATE = (
    "{% for message in messages if message.role == 'user' %}"
    "[INST]{% for part in message.content %}{{ part.text }}{% endfor %}[/INST]{% endfor %}"
)


def tiny_transformer(*, has_guidance: bool = True) -> Flux2Transformer2DModel:
    network = Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        timestep_guidance_channels=64,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=has_guidance,
    )
    randomize(network, seed=1)
    return network.eval()


def tiny_vae(sample_size: int = 1024) -> AutoencoderKLFlux2:
    """With statistics other than those of a new batch norm."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=CHANNELS // 4,
        sample_size=sample_size,
    )
    randomize(vae, seed=2)
    generator = torch.Generator().manual_seed(4)
    vae.bn.running_mean.normal_(generator=generator)
    vae.bn.running_var.uniform_(0.5, 2.0, generator=generator)
    return vae.eval()


def tiny_text() -> tuple[Qwen2Tokenizer, Mistral3ForConditionalGeneration]:
    """A tokenizer of single bytes in place of PixtralProcessor, and 31 layers: the 30th is read."""
    specials = ["<pad>", "[INST]", "[/INST]"]
    tokens = [*sorted(ByteLevel.alphabet()), *specials]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        pad_token="<pad>",
        additional_special_tokens=specials[1:],
        chat_template=_TEMPLATE,
    )
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=FEATURES // 3,
        intermediate_size=16,
        num_hidden_layers=31,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(vision_config=vision, text_config=text)
    )
    randomize(encoder, seed=3)
    return tokenizer, encoder.eval()


def tiny_pipeline(*, has_guidance: bool = True) -> Flux2Pipeline:
    tokenizer, encoder = tiny_text()
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=tiny_transformer(has_guidance=has_guidance),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
