"""Tokenizer and untrained Llama encoder in the places of HunyuanVideo's."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import text_models
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, LlamaTokenizerFast

TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]
PREFIX_TOKENS: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]
LAYERS_SKIPPED = 2
"""Layers whose work the pipeline does not use (`num_hidden_layers_to_skip`)."""

_SPACE = "\u2581"
_BEGIN, _END, _PAD = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"


def tokenizer(words: Sequence[str]) -> LlamaTokenizerFast:
    """BPE that makes one token of every word of the template and of the captions.

    Words that begin the captions follow the template's line breaks, so they have tokens without a
    space before them too, as in Llama 3.
    """
    characters = [*sorted(set(string.printable)), _SPACE]
    merges = _merges(_pieces(words), characters)
    tokens = ["<unk>", _BEGIN, _END, _PAD, *characters, *(left + right for left, right in merges)]
    specials = sorted(set(re.findall(r"<\|\w+\|>", TEMPLATE)))
    made = LlamaTokenizerFast(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_PAD,
        padding_side="right",
        add_bos_token=True,
        add_prefix_space=False,
        model_max_length=PREFIX_TOKENS + text_models.MAX_TOKENS,
    )
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return made


def encoder(tokenizer: LlamaTokenizerFast, width: int) -> LlamaModel:
    """An untrained encoder of which the pipeline uses one layer; it takes no longer prompts."""
    model = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1 + LAYERS_SKIPPED,
            num_attention_heads=4,
            max_position_embeddings=PREFIX_TOKENS + text_models.MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(model.embed_tokens.weight)  # the transformer reads states unnormalised
    return model


def token_ids(tokenizer: LlamaTokenizerFast, captions: Sequence[str]) -> Tensor:
    """Padded ids `(B, 127)` of the captions in the template, exactly as the pipeline makes them."""
    texts = [TEMPLATE.format(caption) for caption in captions]
    return text_models.token_ids(tokenizer, texts, PREFIX_TOKENS + text_models.MAX_TOKENS)


def _pieces(words: Sequence[str]) -> list[str]:
    """What becomes one token: as Llama 3 splits text, a space belongs to the word after it."""
    text = re.sub(r"<\|\w+\|>|{}", "", TEMPLATE).replace(" ", _SPACE)
    pieces = re.findall(rf"\n+|{_SPACE}?[A-Za-z]+", text)
    for word in words:
        pieces += [word, word.capitalize(), _SPACE + word]
    return sorted(set(pieces))


def _merges(pieces: Sequence[str], characters: Sequence[str]) -> list[tuple[str, str]]:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split("\t", "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        initial_alphabet=list(characters),
        show_progress=False,
    )
    learner.train_from_iterator(pieces, trainer)
    return text_models.merges_of(learner)
