"""Tokenizers over the caption vocabulary, and untrained CLIP and T5 text encoders."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from meancache_trt.standins.captions import vocabulary

MAX_TOKENS = 32
WIDTH = 64
_END_OF_WORD = "</w>"
_WORD_BOUNDARY = "\u2581"


def clip_tokenizer(
    words: Sequence[str] | None = None, max_tokens: int = MAX_TOKENS
) -> CLIPTokenizer:
    """Byte-level BPE that merges every word, by default of the pictures' captions, into a token."""
    merges = _bpe_merges(vocabulary() if words is None else words)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + _END_OF_WORD for symbol in symbols)]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_tokens)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: each caption word, lower-case and capitalised, then single characters."""
    words = [word for plain in vocabulary() for word in (plain, plain.capitalize())]
    pieces = [(_WORD_BOUNDARY + word, -2.0) for word in dict.fromkeys(words)]
    pieces.append((_WORD_BOUNDARY, -6.0))
    pieces += [(character, -10.0) for character in string.ascii_letters + string.digits]
    pieces += [(character, -6.0) for character in string.punctuation]
    known = {word for word, _ in pieces}
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>") if token not in known]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=MAX_TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIP text encoder; its pooled state is that of the end token."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """An untrained two-layer T5 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            num_heads=4,
            d_ff=2 * WIDTH,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int = MAX_TOKENS
) -> Tensor:
    """Padded ids `(B, max_tokens)`, exactly as the pipelines make them."""
    encoded = tokenizer(
        list(texts),
        padding="max_length",
        max_length=max_tokens,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids.to(torch.int64)


def _bpe_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = sorted({letter + _END_OF_WORD for word in words for letter in word})
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        special_tokens=ends,  # numbers them, so that every process breaks ties in the same way
        end_of_word_suffix=_END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return merges_of(tokenizer)


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges that a byte-pair tokenizer has learned, in order."""
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges]
