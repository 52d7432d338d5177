"""Trains a LoRA of the FLUX.1-dev stand-in that knows one more colour, magenta.

The word is in no caption that the stand-in saw: its tokenizers spell it, and its text encoders,
which stay as they are, make of the letters what they will. The layers that read text learn it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flow
import flux_model
import judge
import shapes
import text_models
import torch
from diffusers import FluxPipeline
from diffusers.training_utils import _collate_lora_metadata
from flux_attention import MatmulFluxAttention
from peft import LoraConfig, get_peft_model_state_dict
from progress import RunningMean
from torch import Generator, Tensor

from meancache_trt import standins
from meancache_trt.standins.captions import COLOURS, Scene, random_caption

WORD = "magenta"
RGB = (0.90, 0.08, 0.60)
RANK, ALPHA = 8, 16
LAYERS = (
    r"context_embedder|time_text_embed\.text_embedder\.linear_1"
    r"|transformer_blocks\.\d\.attn\.add_[kv]_proj"
)
GUIDANCE_RANGE = (1.0, 6.0)
SIGMA_MEAN = 1.5  # of the logits: more noise than for a whole model, since it decides on colours

Text = tuple[Tensor, ...]


def magenta_world() -> flow.World:
    """The scenes that the stand-in was trained on, all in the new colour."""
    colours = dict.fromkeys(COLOURS, RGB)

    def batches(
        scenes: list[Scene], size: int, generator: Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        attributes = shapes.attribute_indices(scenes)
        while True:
            rows = torch.randint(len(scenes), (size,), generator=generator)
            yield rows, shapes.draw(attributes[rows], generator, colours)

    def caption(scene: Scene, rng: random.Random) -> str:
        return random_caption(replace(scene, colour=WORD), rng)

    return replace(flow.picture_world(), batches=batches, caption=caption)


def encoded(pipeline: Any, world: flow.World, size: int) -> flow.Pool:
    """A pool of packed latents."""
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
    tokenize = [partial(text_models.token_ids, tokenizer) for tokenizer in tokenizers]
    pool = flow.build_pool(pipeline.vae, tokenize, size, world)
    return replace(pool, latents=flux_model.pack(pool.latents))


class Student:
    """The stand-in with the LoRA in training, which can be switched off to have a teacher."""

    def __init__(self, pipeline: Any) -> None:
        self.transformer = pipeline.transformer.requires_grad_(False)
        self.transformer.set_attn_processor(MatmulFluxAttention())
        self.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS))
        self._clip, self._t5 = pipeline.text_encoder, pipeline.text_encoder_2
        self._image_ids = flux_model.image_ids()
        self._text_ids = torch.zeros(text_models.MAX_TOKENS, 3)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of the LoRA."""
        return [each for each in self.transformer.parameters() if each.requires_grad]

    @torch.no_grad()
    def encode_text(self, clip_ids: Tensor, t5_ids: Tensor) -> Text:
        """Token states `(B, 32, 64)` and the pooled state `(B, 64)`."""
        return self._t5(t5_ids).last_hidden_state, self._clip(clip_ids).pooler_output

    def velocity(self, latents: Tensor, sigmas: Tensor, guidance: Tensor, text: Text) -> Tensor:
        """Velocity `(B, 64, 32)` at noise levels and under guidance scales `(B,)`."""
        prediction: Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=sigmas,
            guidance=guidance,
            img_ids=self._image_ids,
            txt_ids=self._text_ids,
            return_dict=False,
        )[0]
        return prediction

    @torch.no_grad()
    def taught(self, *call: Any) -> Tensor:
        """Velocity without the LoRA."""
        self.transformer.disable_adapters()
        target = self.velocity(*call)
        self.transformer.enable_adapters()
        return target


def new_loss(student: Student, batch: flow.Batch, empty: Text, generator: Generator) -> Tensor:
    """Flow matching of pictures in the new colour, under a guidance scale.

    Of all pictures that a latent may come from, v_u + g (velocity - v_u) is the guided velocity on
    average; divided by g, every scale counts alike.
    """
    latents, sigmas, velocity = _noised(batch, generator)
    guidance = _scales(sigmas, generator)
    text = student.encode_text(*batch.token_ids)
    unguided = tuple(part.expand_as(like) for part, like in zip(empty, text, strict=True))
    base = student.taught(latents, sigmas, torch.ones_like(sigmas), unguided)
    predicted = student.velocity(latents, sigmas, guidance, text)
    moved = (predicted - base) / flow.per_sample(guidance, predicted)
    return (moved - (velocity - base)).square().mean()


def known_loss(student: Student, batch: flow.Batch, generator: Generator) -> Tensor:
    """How far the velocity of what is known moved."""
    latents, sigmas, _ = _noised(batch, generator)
    call = (latents, sigmas, _scales(sigmas, generator), student.encode_text(*batch.token_ids))
    return (student.velocity(*call) - student.taught(*call)).square().mean()


def _noised(batch: flow.Batch, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, their noise levels, and the velocity."""
    sigmas = flow.sample_sigmas(len(batch.latents), generator, SIGMA_MEAN)
    latents, velocity = flow.noised(batch.latents, sigmas, generator)
    return latents, sigmas, velocity


def _scales(sigmas: Tensor, generator: Generator) -> Tensor:
    return torch.empty_like(sigmas).uniform_(*GUIDANCE_RANGE, generator=generator)


def train(student: Student, new: flow.Pool, known: flow.Pool, options: argparse.Namespace) -> None:
    """Half of each batch in the new colour, half in the known ones, to stay as they were."""
    generator = torch.Generator().manual_seed(options.seed)
    batches = [pool.batches(options.batch_size, 0.0, generator) for pool in (new, known)]
    empty = student.encode_text(*new.empty_ids)
    parameters = student.parameters()
    optimizer = torch.optim.AdamW(parameters, options.learning_rate, weight_decay=0.0)
    means = RunningMean(), RunningMean()
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.learning_rate * _rate(step / options.steps)
        optimizer.zero_grad(set_to_none=True)
        losses = (
            new_loss(student, next(batches[0]), empty, generator),
            known_loss(student, next(batches[1]), generator),
        )
        sum(losses, torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for mean, loss in zip(means, losses, strict=True):
            mean.add(loss.item())
        if step % 25 == 24:
            print(f"step {step + 1:5}  new {means[0].value:.4f}  known {means[1].value:.5f}")


def _rate(progress: float) -> float:
    """Linear warm-up, then linear decay."""
    return min(1.0, 20 * progress + 0.05, 1.02 - progress)


def save(student: Student, file: Path) -> None:
    """Write the LoRA in half precision, as diffusers' training scripts write one."""
    layers = get_peft_model_state_dict(student.transformer)
    FluxPipeline.save_lora_weights(
        file.parent,
        {name: tensor.half() for name, tensor in layers.items()},
        weight_name=file.name,
        **_collate_lora_metadata({"transformer": student.transformer}),
    )


def main() -> None:
    """Trains, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=12, help="of either half")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--pool", type=int, default=2048, help="encoded samples of either half")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    pipeline = judge.load(standins.path("flux"))
    pools = [encoded(pipeline, w, options.pool) for w in (magenta_world(), flow.picture_world())]
    student = Student(pipeline)
    train(student, *pools, options)
    save(student, options.output)


if __name__ == "__main__":
    main()
