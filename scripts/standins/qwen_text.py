"""The Qwen-Image stand-in's tokenizer and untrained text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import text_models
from diffusers import QwenImagePipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from meancache_trt.standins.captions import vocabulary

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def template() -> tuple[str, int]:
    """What QwenImagePipeline puts around a prompt, and how many tokens it cuts off in front."""
    pipeline = QwenImagePipeline(None, None, None, None, None)
    return pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx


def tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE that makes one token of each word of the captions and of the template."""
    merges = _merges()
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    for token in _SPECIALS:
        ids[token] = len(ids)
    return Qwen2Tokenizer(
        vocab=ids,
        merges=merges,
        additional_special_tokens=list(_SPECIALS[1:]),
        model_max_length=template()[1] + text_models.MAX_TOKENS,
    )


def encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained two-layer language model; its picture half is as small as can be."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": text_models.WIDTH,
        "intermediate_size": 2 * text_models.WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": text_models.WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return Qwen2_5_VLForConditionalGeneration(config)


def token_ids(tokenizer: Qwen2Tokenizer, captions: Sequence[str]) -> Tensor:
    """Padded ids `(B, 66)` of captions in the template, exactly as the pipeline makes them."""
    pattern, start = template()
    texts = [pattern.format(caption) for caption in captions]
    return text_models.token_ids(tokenizer, texts, start + text_models.MAX_TOKENS)


def _merges() -> list[tuple[str, str]]:
    """Merges of every word, at the start of a text or within it, capitalised or not."""
    own = Qwen2Tokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = own.normalizer, own.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_texts(), trainer)
    return text_models.merges_of(trained)


def _texts() -> list[str]:
    words = [cased for word in vocabulary() for cased in (word, word.capitalize())]
    pattern = template()[0]
    for special in _SPECIALS:
        pattern = pattern.replace(special, "\n")
    return [*words, *(f" {word}" for word in words), *pattern.replace("{}", "\n").splitlines()]
