"""The HunyuanVideo stand-in: its configuration and its pipeline."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import llama_text
import moving_shapes
import pipeline_folder
import text_models
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, LlamaTokenizerFast

from meancache_trt.standins.video_captions import vocabulary

SHIFT = 7.0
ROPE_THETA = 10_000.0
"""FLUX's, whose weights training starts from; HunyuanVideo has 256."""

CLIP_TOKENS = 77
"""What the pipeline pads CLIP's ids to."""


def transformer(latent_channels: int) -> HunyuanVideoTransformer3DModel:
    """An untrained guidance-embedded HunyuanVideo transformer for 3 x 6 x 6 tokens."""
    return HunyuanVideoTransformer3DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=text_models.WIDTH,
        pooled_projection_dim=text_models.WIDTH,
        rope_theta=ROPE_THETA,
        rope_axes_dim=(8, 12, 12),
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler flow matching with HunyuanVideo's shift."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


@dataclass(frozen=True)
class Tokenizers:
    """The two tokenizers of the pipeline."""

    clip: CLIPTokenizer
    llama: LlamaTokenizerFast


def tokenizers() -> Tokenizers:
    """One token a word, for either encoder."""
    words = vocabulary()
    clip = text_models.clip_tokenizer(words, CLIP_TOKENS)
    return Tokenizers(clip, llama_text.tokenizer(words))


class HunyuanVideoNetwork(nn.Module):
    """Text encoders and transformer as one module, so that they train together."""

    def __init__(self, tokenizers: Tokenizers, latent_channels: int) -> None:
        super().__init__()
        self.clip: CLIPTextModel = text_models.clip_encoder(tokenizers.clip)
        self.llama: LlamaModel = llama_text.encoder(tokenizers.llama, text_models.WIDTH)
        self.transformer: HunyuanVideoTransformer3DModel = transformer(latent_channels)

    @property
    def text_encoders(self) -> tuple[nn.Module, nn.Module]:
        """What distillation leaves as it is."""
        return self.clip, self.llama

    def encode_text(self, clip_ids: Tensor, llama_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token states `(B, 32, 64)`, their mask, and the pooled state `(B, 64)`.

        Padding comes last and the encoders look back only, so its length changes nothing.
        """
        outputs = self.llama(llama_ids, output_hidden_states=True)
        states = outputs.hidden_states[-(llama_text.LAYERS_SKIPPED + 1)]
        mask = llama_ids != self.llama.config.pad_token_id
        start = llama_text.PREFIX_TOKENS
        return states[:, start:], mask[:, start:], self.clip(clip_ids).pooler_output

    def velocity(
        self,
        latents: Tensor,
        sigmas: Tensor,
        text: tuple[Tensor, Tensor, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity `(B, C, 3, 12, 12)` at noise levels `(B,)` under guidance scales `(B,)`."""
        states, mask, pooled = text
        guidance = torch.ones_like(sigmas) if guidance is None else guidance
        prediction = self.transformer(
            hidden_states=latents,
            timestep=sigmas * 1000,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            pooled_projections=pooled,
            guidance=guidance * 1000,
            return_dict=False,
        )
        return prediction[0]


def save_pipeline(
    network: HunyuanVideoNetwork,
    autoencoder: AutoencoderKLHunyuanVideo,
    tokenizers: Tokenizers,
    folder: Path,
) -> None:
    """Writes a complete half-precision HunyuanVideoPipeline folder."""
    network, vae = copy.deepcopy(network), pipeline_folder.without_origin(autoencoder)
    vae.register_to_config(  # for the export's defaults, see export/hunyuan_video.py
        _sample_size=moving_shapes.SIDE, _sample_frames=moving_shapes.FRAMES
    )
    pipeline = HunyuanVideoPipeline(
        text_encoder=network.llama,
        tokenizer=tokenizers.llama,
        transformer=network.transformer,
        vae=vae,
        scheduler=scheduler(),
        text_encoder_2=network.clip,
        tokenizer_2=tokenizers.clip,
    )
    pipeline_folder.save(pipeline, folder)
