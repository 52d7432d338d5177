"""Tiny random Z-Image pipelines."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.export.tiny_flux import randomize, tiny_vae

FEATURES = 48

# What Qwen3's own template comes to for one message of a user, to be thought about
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def tiny_transformer() -> ZImageTransformer2DModel:
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=FEATURES,
        axes_dims=[8, 12, 12],
    )
    randomize(network, seed=1)
    return network.eval()


def tiny_text() -> tuple[Qwen2Tokenizer, Qwen3Model]:
    """A tokenizer of single bytes, and a network of which the last layer is not read."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*sorted(ByteLevel.alphabet()), *specials]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        additional_special_tokens=specials[1:],
        chat_template=_TEMPLATE,
    )
    config = Qwen3Config(
        vocab_size=len(tokens),
        hidden_size=FEATURES,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=None,
        eos_token_id=0,
    )
    encoder = Qwen3Model(config)
    randomize(encoder, seed=3)
    return tokenizer, encoder.eval()


def tiny_pipeline(*, shift: float = 6.0) -> ZImagePipeline:
    """Shift 6 is Z-Image's, 3 that of Z-Image-Turbo."""
    tokenizer, encoder = tiny_text()
    vae: AutoencoderKL = tiny_vae()
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=tiny_transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
