"""Tiny random Qwen-Image pipelines."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.export.tiny_flux import randomize

FEATURES = 48


def tiny_transformer() -> QwenImageTransformer2DModel:
    network = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        axes_dims_rope=(8, 12, 12),
    )
    randomize(network, seed=1)
    return network.eval()


def tiny_vae() -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 1.5, -0.3],
        latents_std=[2.8, 1.4, 1.1, 3.2],
    )
    randomize(vae, seed=2)
    return vae.eval()


def tiny_text() -> tuple[Qwen2Tokenizer, Qwen2_5_VLForConditionalGeneration]:
    """A tokenizer of single bytes, and a network whose picture half is never used."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*sorted(ByteLevel.alphabet()), *specials]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        additional_special_tokens=specials[1:],
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": FEATURES,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "bos_token_id": None,
            "eos_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 4, 4],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": FEATURES,
            "fullatt_block_indexes": [0],
        },
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    randomize(encoder, seed=3)
    return tokenizer, encoder.eval()


def tiny_pipeline() -> QwenImagePipeline:
    tokenizer, encoder = tiny_text()
    pipeline = QwenImagePipeline(
        # Qwen/Qwen-Image, scheduler/scheduler_config.json
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256,
            base_shift=0.5,
            max_image_seq_len=8192,
            max_shift=0.9,
            shift_terminal=0.02,
            use_dynamic_shifting=True,
        ),
        vae=tiny_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=tiny_transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
