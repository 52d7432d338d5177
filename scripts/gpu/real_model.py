"""FLUX.1-dev's architecture with random weights: its bundle, and the same module in torch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.full_size.models import MODELS, FullSize
from scripts.gpu.bank import share_values

from meancache_trt import build as stages
from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.engine.probe import probe

Blocks = tuple[int, int]
"""Double-stream and single-stream blocks; the published model has 19 and 38."""

ALL_BLOCKS: Blocks = (19, 38)
_BYTES = 23_800_000_000  # of all blocks in bfloat16
_ROOM = 1.15  # activations, workspace and torch's allocator, beside the weights
_TINY = {"num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32}
_TINY_VAE = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
_SMALL_T5 = {"num_layers": 1, "d_ff": 64, "num_heads": 1, "vocab_size": 512}
_SMALL_CLIP = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 49408}


@dataclass(frozen=True)
class RealModel:
    """Where its bundle lies, and how many blocks it has; `is_tiny` for a rehearsal.

    It is in bfloat16, as it is published; a GPU that has none runs the float32 graphs.
    """

    work: Path
    blocks: Blocks
    is_tiny: bool

    @property
    def side(self) -> int:
        """Pixels of a side of the square picture."""
        return 64 if self.is_tiny else 1024

    @property
    def text_tokens(self) -> int:
        """Of the prompt, padding included."""
        return 32 if self.is_tiny else 512

    @property
    def name(self) -> str:
        """Such as FLUX.1-dev, 19 + 38 blocks."""
        double, single = self.blocks
        size = "a tiny transformer" if self.is_tiny else "FLUX.1-dev"
        return f"{size}, {double} + {single} blocks, {self.side}x{self.side}"

    @property
    def directory(self) -> Path:
        """Of the bundle."""
        return self.work / f"real-size-{self.blocks[0]}-{self.blocks[1]}.mcb"

    def described(self) -> FullSize:
        """The published configurations with these blocks, and text encoders of one layer.

        Nothing is encoded: the network is fed random embeddings of the published shapes.
        """
        model = MODELS["FLUX.1-dev"]
        double, single = self.blocks
        transformer = {**model.transformer, "num_layers": double, "num_single_layers": single}
        vae = model.vae
        if self.is_tiny:
            transformer, vae = {**transformer, **_TINY}, {**vae, **_TINY_VAE}
        widths = transformer["joint_attention_dim"], transformer["pooled_projection_dim"]
        clip, t5 = model.encoders["text_encoder"], model.encoders["text_encoder_2"]
        clip_width = {"hidden_size": widths[1], "projection_dim": widths[1]}
        encoders = {
            "text_encoder": {**clip, **_SMALL_CLIP, **clip_width, "num_attention_heads": 1},
            "text_encoder_2": {**t5, **_SMALL_T5, "d_model": widths[0]},
        }
        return replace(model, transformer=transformer, vae=vae, encoders=encoders)

    def bundle(self) -> Bundle:
        """The bundle; exported once, then kept."""
        if (self.directory / MANIFEST).is_file():
            return Bundle.open(self.directory)
        from scripts.full_size.checkpoint import write_checkpoint  # noqa: PLC0415  (torch, slow)

        checkpoint = self.directory.with_suffix(".checkpoint")
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_checkpoint(checkpoint, self.described(), has_values=False)
        for part in ("transformer", "vae"):
            share_values(checkpoint / part)
        options = stages.ExportOptions(
            size=(self.side, self.side),
            text_tokens=self.text_tokens,
            precisions=() if self.is_tiny else ("bfloat16",),
            is_parity_checked=False,
        )
        found = stages.find_model(str(checkpoint))
        return stages.export(found, self.directory, options, note=_say, is_forced=False)

    def in_torch(self, device: str) -> Any:
        """Diffusers' own module on a device, with random weights that were made there."""
        import torch  # noqa: PLC0415  (slow, and not needed to list slices)
        from diffusers import FluxTransformer2DModel  # noqa: PLC0415

        dtype = torch.float32 if self.is_tiny else torch.bfloat16
        with torch.device("meta"):
            network = FluxTransformer2DModel.from_config(dict(self.described().transformer))
        # torch's own `to`: diffusers' warns of modules that other models keep in float32.
        torch.nn.Module.to(network, dtype).to_empty(device=device).eval().requires_grad_(False)
        for name, value in network.named_parameters():
            if value.ndim == 1 and name.endswith("weight"):
                value.fill_(1)
            else:
                value.normal_(0, 0.02)
        return network


def fitting_blocks(copies: float) -> Blocks:
    """As many blocks as the GPU has room for, with so many bfloat16 copies of them at a time."""
    gpu = probe().gpus[0]
    share = min(1.0, gpu.free_bytes / (_ROOM * _BYTES * copies))
    return max(1, int(ALL_BLOCKS[0] * share)), max(1, int(ALL_BLOCKS[1] * share))


def prepared_model(work: Path, *, is_tiny: bool) -> RealModel | None:
    """The largest model that was exported in a work folder, or None."""
    found: Mapping[Blocks, Path] = {
        _blocks_of(path): path
        for path in work.glob("real-size-*.mcb")
        if (path / MANIFEST).is_file()
    }
    return RealModel(work, max(found), is_tiny) if found else None


def _blocks_of(path: Path) -> Blocks:
    double, single = path.stem.rsplit("-", 2)[1:]
    return int(double), int(single)


def _say(message: str) -> None:
    print(message, file=sys.stderr)
