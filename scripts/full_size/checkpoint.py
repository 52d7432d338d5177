"""A diffusers folder of full size in sparse files: the real names, shapes and shards, few bytes.

Tensors outside of repeated blocks, and the first of each kind of block, get random values, so that
the parity check compares something; all others are holes, which read as zeros.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import diffusers
import numpy as np
import transformers
from accelerate import init_empty_weights
from numpy.typing import NDArray
from scripts.full_size.models import Config, FullSize

from meancache_trt import standins

_SHARD_BYTES = 9_900_000_000  # what diffusers writes at most into one file
_BYTES = 2  # bfloat16
_BLOCK = re.compile(r"(?:transformer_blocks|\bblock|\blayers|\bblocks)\.(\d+)\.")
_LEARNED_DEVIATION = 0.02

Shapes = Mapping[str, tuple[int, ...]]


def write_checkpoint(
    folder: Path, model: FullSize, *, has_values: bool = True, is_dense: bool = False
) -> None:
    """Write the folder as `save_pretrained` would, with tokenizers of the FLUX stand-in.

    Without `has_values` all tensors are holes; with `is_dense` none is, and no two are alike, which
    a builder would store once.
    """
    writer = _Writer(has_values, is_dense)
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": model.pipeline, **model.index}
    parts = {"transformer": model.transformer, "vae": model.vae}
    if model.transformer_2 is not None:
        parts["transformer_2"] = model.transformer_2
    for name, config in parts.items():
        index[name] = ["diffusers", config["_class_name"]]
        writer.part(folder / name, config, _diffusers_shapes(config), "diffusion_pytorch_model")
    for name, config in model.encoders.items():
        index[name] = ["transformers", config["architectures"][0]]
        writer.part(folder / name, config, _encoder_shapes(config), "model")
        _copy_tokenizer(folder, name.replace("text_encoder", "tokenizer"), index)
    index["scheduler"] = ["diffusers", model.scheduler["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    _write_json(folder / "model_index.json", index)


def _diffusers_shapes(config: Config) -> Shapes:
    with init_empty_weights():
        network = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _encoder_shapes(config: Config) -> Shapes:
    made = transformers.AutoConfig.for_model(**config)
    with init_empty_weights():
        network = getattr(transformers, config["architectures"][0])(made)
    stored: dict[int, str] = {}
    for name, value in network.state_dict(keep_vars=True).items():
        stored.setdefault(id(value), name)  # a tied weight is stored once
    shapes = network.state_dict()
    return {name: tuple(shapes[name].shape) for name in stored.values()}


@dataclass(frozen=True)
class _Writer:
    has_values: bool
    is_dense: bool

    def part(self, folder: Path, config: Config, shapes: Shapes, stem: str) -> None:
        """Configuration and weights of one component."""
        _write_json(folder / "config.json", config)
        shards, filled = list(_shards(shapes)), self._filled(shapes)
        if len(shards) == 1:
            self.shard(folder / f"{stem}.safetensors", shards[0], filled)
            return
        places = {}
        for number, shard in enumerate(shards, start=1):
            name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            self.shard(folder / name, shard, filled)
            places.update(dict.fromkeys(shard, name))
        _write_json(folder / f"{stem}.safetensors.index.json", {"weight_map": places})

    def _filled(self, shapes: Shapes) -> Set[str]:
        if not self.has_values:
            return set()
        return shapes.keys() if self.is_dense else _sampled(shapes)

    def shard(self, path: Path, shapes: Shapes, filled: Set[str]) -> None:
        """A safetensors file, whose tensors outside of `filled` are holes."""
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + _length(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            start = file.tell()
            for name, shape in shapes.items():
                if name in filled:
                    file.seek(start + header[name]["data_offsets"][0])
                    seed = zlib.crc32(name.encode()) if self.is_dense else len(name)
                    _write_values(file, name, shape, seed)
            file.truncate(start + end)


def _shards(shapes: Shapes) -> Iterator[Shapes]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and _size(shard) + _length(shape) > _SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _size(shapes: Shapes) -> int:
    return sum(_length(shape) for shape in shapes.values())


def _length(shape: tuple[int, ...]) -> int:
    return _BYTES * int(np.prod(shape, dtype=np.int64))


def _sampled(shapes: Shapes) -> set[str]:
    """Tensors outside of repeated blocks, and of the first block of each kind, as in parity."""
    blocks: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    sampled = set()
    for name, shape in shapes.items():
        found = _BLOCK.search(name)
        if found is None:
            sampled.add(name)
        else:
            blocks.setdefault(name[: found.end()], []).append((name[found.end() :], shape))
    kinds = set[object]()
    for block, tensors in blocks.items():
        kind = (block.rstrip("0123456789."), *tensors)
        if kind not in kinds:
            kinds.add(kind)
            sampled.update(block + name for name, _ in tensors)
    return sampled


def _write_values(file: BinaryIO, name: str, shape: tuple[int, ...], seed: int) -> None:
    generator = np.random.default_rng(seed)
    is_near_one = ("norm" in name and name.endswith("weight")) or name.endswith("running_var")
    scale = 1.0 if is_near_one else 0.0
    remaining = _length(shape) // _BYTES
    while remaining:
        count = min(remaining, 1 << 24)
        values = generator.standard_normal(count, np.float32) * np.float32(_LEARNED_DEVIATION)
        file.write(_bfloat16(values + np.float32(scale)).tobytes())
        remaining -= count


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves, which rounds towards zero: any bfloat16 values will do here."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _copy_tokenizer(folder: Path, name: str, index: dict[str, Any]) -> None:
    standin = standins.path("flux")
    known = name if (standin / name).exists() else "tokenizer"  # a third is any of them
    shutil.copytree(standin / known, folder / name)
    kind = json.loads((folder / name / "tokenizer_config.json").read_text())["tokenizer_class"]
    index[name] = ["transformers", kind]


def _write_json(path: Path, content: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
