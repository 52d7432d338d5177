"""The FLUX.1-dev stand-in: its configuration, packing and saved pipeline."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pipeline_folder
import shapes
import text_models
import torch
from autoencoder import SCALE_FACTOR
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

SHIFT = 3.0
PACKED_SIDE = shapes.IMAGE_SIZE // (2 * SCALE_FACTOR)


def transformer(latent_channels: int) -> FluxTransformer2DModel:
    """An untrained guidance-embedded FLUX transformer for 8 x 8 packed latents."""
    return FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=text_models.WIDTH,
        pooled_projection_dim=text_models.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler flow matching with a static shift of 3."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)


def pack(latents: Tensor) -> Tensor:
    """Latents `(B, C, 16, 16)` as tokens `(B, 64, 4 C)`, in FLUX's order."""
    batch, channels, height, width = latents.shape
    folded = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return folded.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def image_ids() -> Tensor:
    """Positions `(64, 3)` of the packed tokens."""
    rows, columns = torch.meshgrid(*[torch.arange(PACKED_SIDE)] * 2, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


@dataclass(frozen=True)
class Tokenizers:
    """The two tokenizers of the pipeline."""

    clip: CLIPTokenizer
    t5: T5Tokenizer


class FluxNetwork(nn.Module):
    """Text encoders and transformer as one module, so that they train together."""

    def __init__(self, tokenizers: Tokenizers, latent_channels: int) -> None:
        super().__init__()
        self.clip: CLIPTextModel = text_models.clip_encoder(tokenizers.clip)
        self.t5: T5EncoderModel = text_models.t5_encoder(tokenizers.t5)
        self.transformer: FluxTransformer2DModel = transformer(latent_channels)
        self.register_buffer("image_ids", image_ids(), persistent=False)
        self.register_buffer("text_ids", torch.zeros(text_models.MAX_TOKENS, 3), persistent=False)

    @property
    def text_encoders(self) -> tuple[nn.Module, nn.Module]:
        """What distillation leaves as it is."""
        return self.clip, self.t5

    def encode_text(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token states `(B, 32, 64)` and the pooled state `(B, 64)`."""
        return self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output

    def velocity(
        self,
        latents: Tensor,
        sigmas: Tensor,
        text: tuple[Tensor, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity `(B, 64, 4 C)` at noise levels `(B,)` under guidance scales `(B,)`."""
        prediction = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=sigmas,
            guidance=torch.ones_like(sigmas) if guidance is None else guidance,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )
        return prediction[0]


def save_pipeline(
    network: FluxNetwork, autoencoder: AutoencoderKL, tokenizers: Tokenizers, folder: Path
) -> None:
    """Writes a complete half-precision FluxPipeline folder."""
    network = copy.deepcopy(network)
    pipeline = FluxPipeline(
        scheduler=scheduler(),
        vae=pipeline_folder.without_origin(autoencoder),
        text_encoder=network.clip,
        tokenizer=tokenizers.clip,
        text_encoder_2=network.t5,
        tokenizer_2=tokenizers.t5,
        transformer=network.transformer,
    )
    pipeline_folder.save(pipeline, folder)
