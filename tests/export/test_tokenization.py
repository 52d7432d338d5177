from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meancache_trt import standins
from meancache_trt.errors import ExportError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.tokenization import write_tokenizer
from meancache_trt.manifest import Tokenizer

NASTY = [
    "",
    " ",
    "\t\n\r \u00a0\u3000",
    "a",
    "A Large  PLAIN\tred circle, left; gray!",
    "don't we'll I'm they've '' \" `` [(2+2)*3=12]",
    "café cafe\u0301 ﬁ ① Ⅷ ß İ ǆ",
    "東京タワー Москва العربية हिन्दी 한국어",
    "🦊🔥👩‍🚀🏳️‍🌈 \ufe0f\u200b\u200d\u2066",
    "<|startoftext|> <|endoftext|> </s> <pad> <unk> <extra_id_0> ▁ </w>",
    "\x00\x01\x7f\ufffd\U0010ffff",
    "a long walk " * 500,
    "x" * 5000,
    "1234567890 3.14 1e-5 #hash @at http://a.b/c?d=e&f",
]

PIECES = st.sampled_from(
    [*NASTY[:11], "red", "Circle ", "e\u0301", " ", "\n\n", "</s>", "🦊", "'s"]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=6).map("".join))


@dataclass(frozen=True)
class Subject:
    """A tokenizer as the pipeline has it, and a way to write it as a bundle's."""

    checkpoint: Path
    part: str

    def own(self) -> Any:
        _, class_name = Checkpoint(self.checkpoint).index[self.part]
        return getattr(transformers, class_name).from_pretrained(self.checkpoint / self.part)

    def written(self, folder: Path, length: int) -> tuple[Tokenizer, tokenizers.Tokenizer]:
        folder.mkdir(exist_ok=True)
        record = write_tokenizer(Checkpoint(self.checkpoint), self.part, folder, ".", length)
        return record, tokenizers.Tokenizer.from_file(str(folder / record.path))


@pytest.fixture(scope="module")
def plain_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tokenizer as FLUX.1 has it: vocab.json and merges.txt, and no tokenizer.json."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("f", "o"), ("fo", "x</w>"), ("ð", "Ł"), ("Ã", "©")]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    folder.mkdir()
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    index = {"_class_name": "FluxPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder.parent / "model_index.json").write_text(json.dumps(index))
    return folder.parent


@pytest.fixture(scope="module", params=["clip", "t5", "clip of vocab and merges"])
def subject(request: pytest.FixtureRequest, plain_clip: Path) -> Subject:
    return {
        "clip": Subject(standins.path("flux"), "tokenizer"),
        "t5": Subject(standins.path("flux"), "tokenizer_2"),
        "clip of vocab and merges": Subject(plain_clip, "tokenizer"),
    }[request.param]


@pytest.fixture(scope="module")
def pair(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Tokenizer]:
    record, made = subject.written(tmp_path_factory.mktemp("written"), 24)
    return subject.own(), made, record


def own_ids(own: Any, text: str, length: int) -> list[int]:
    """Called as FluxPipeline calls its tokenizers."""
    ids: list[int] = own(
        [text], padding="max_length", max_length=length, truncation=True
    ).input_ids[0]
    return ids


@pytest.mark.parametrize("text", NASTY)
def test_ids_of_awkward_prompts_are_the_pipelines(pair: tuple[Any, Any, Any], text: str) -> None:
    own, made, _ = pair
    assert made.encode(text).ids == own_ids(own, text, 24)


@given(text=TEXTS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_ids_of_any_prompt_are_the_pipelines(pair: tuple[Any, Any, Any], text: str) -> None:
    own, made, _ = pair
    assert made.encode(text).ids == own_ids(own, text, 24)


@pytest.mark.parametrize("length", [2, 3, 77, 512])
def test_ids_of_any_length_are_the_pipelines(subject: Subject, tmp_path: Path, length: int) -> None:
    own, (_, made) = subject.own(), subject.written(tmp_path, length)
    for text in NASTY:
        assert made.encode(text).ids == own_ids(own, text, length)


def test_the_end_token_closes_a_prompt_that_was_cut(pair: tuple[Any, Any, Tokenizer]) -> None:
    own, made, record = pair
    assert record.length == 24
    assert made.encode("a long walk " * 500).ids[-1] == own.eos_token_id


def broken(folder: Path, **files: str) -> Checkpoint:
    (folder / "tokenizer").mkdir()
    index = {"_class_name": "FluxPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, content in files.items():
        (folder / "tokenizer" / f"{name}.json").write_text(content)
    return Checkpoint(folder)


def test_a_tokenizer_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    source = broken(tmp_path, vocab=json.dumps(dict.fromkeys(string.ascii_lowercase, 0)))
    with pytest.raises(ExportError, match=r"cannot be loaded as CLIPTokenizer.*download"):
        write_tokenizer(source, "tokenizer", tmp_path, ".", 8)
