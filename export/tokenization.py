"""A pipeline's tokenizers as files that the tokenizers library executes without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import transformers

from meancache_trt.errors import ExportError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.manifest import Tokenizer

# What tokenizers disagree about: nothing at all, white space, case, accents that combine, scripts
# without spaces, characters of four bytes, special tokens in the text, and more than fits.
_PROBES = (
    "",
    " \t\n two  spaces ",
    "UPPER lower, don't... (42)!",
    "café cafe\u0301 ﬁ ① 東京 Москва",
    "🦊👩‍🚀 <|endoftext|> </s> <pad>",
    "a long walk " * 300,
)


def write_tokenizer(
    source: Checkpoint, part: str, root: Path, folder: str, length: int
) -> Tokenizer:
    """Write root/folder/tokenizer.json, which cuts and pads to `length` ids; its record.

    Raises `ExportError` where the checkpoint's tokenizer cannot be loaded or written so, or where
    the file's ids differ from those of the tokenizer that diffusers would use.
    """
    own = _load(source, part)
    made = tokenizers.Tokenizer.from_str(own.backend_tokenizer.to_str())
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=own.pad_token_id, pad_token=own.pad_token)
    _check(part, own, made, length)
    path = f"{folder}/tokenizer.json"
    (root / path).write_text(made.to_str(), encoding="utf-8")
    return Tokenizer(path, length)


def _load(source: Checkpoint, part: str) -> Any:
    """The tokenizer of the class that model_index.json names, as the pipeline loads it."""
    _, class_name = source.index[part]
    folder = source.path / part
    try:
        tokenizer = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder} cannot be loaded as {class_name}: {str(error).splitlines()[0]}; download "
            "the checkpoint again"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None or tokenizer.pad_token_id is None:
        raise ExportError(
            f"{folder} is a {class_name} that has no padding token or is not made by the "
            "tokenizers library; save it as a fast tokenizer with its tokenizer.json"
        )
    return tokenizer


def _check(part: str, own: Any, made: tokenizers.Tokenizer, length: int) -> None:
    expected = own(list(_PROBES), padding="max_length", max_length=length, truncation=True)
    for text, ids in zip(_PROBES, expected.input_ids, strict=True):
        if made.encode(text).ids != ids:
            raise ExportError(
                f"{part}: the ids of {text[:40]!r} differ between {type(own).__name__} and its "
                "tokenizer.json. Please report it with the version of transformers"
            )
