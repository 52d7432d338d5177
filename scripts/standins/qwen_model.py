"""The Qwen-Image stand-in: its configuration, and its saved pipeline."""

from __future__ import annotations

import copy
from pathlib import Path

import flux_model
import pipeline_folder
import qwen_text
import shapes
import text_models
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from flux_model import PACKED_SIDE
from qwen_attention import FixedRope, MatmulQwenAttention
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from meancache_trt.export.qwen_image_torch import position_tables


def transformer(latent_channels: int) -> QwenImageTransformer2DModel:
    """An untrained Qwen-Image transformer for 8 x 8 packed latents."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * latent_channels,
        out_channels=latent_channels,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=text_models.WIDTH,
        axes_dims_rope=(8, 12, 12),
    )


class QwenNetwork(nn.Module):
    """Text encoder and transformer as one module, so that they train together."""

    def __init__(self, tokenizer: Qwen2Tokenizer, latent_channels: int) -> None:
        super().__init__()
        self.start, self.pad_id = qwen_text.template()[1], tokenizer.pad_token_id
        self.text_encoder: Qwen2_5_VLForConditionalGeneration = qwen_text.encoder(tokenizer)
        self.transformer: QwenImageTransformer2DModel = transformer(latent_channels)

    def fix_size(self) -> None:
        """Makes the transformer fast to train, at one size and one text length only."""
        config, pictures = self.transformer.config, [(1, PACKED_SIDE, PACKED_SIDE)]
        tables = position_tables({"transformer": config}, pictures, text_models.MAX_TOKENS)
        self.transformer.pos_embed = FixedRope(tables["image_rope"], tables["text_rope"])
        self.transformer.set_attn_processor(MatmulQwenAttention())

    def encode_text(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, 32, 64)` of the tokens after the template's beginning, and their mask.

        The language model looks back only, so padding behind a text changes nothing before it.
        """
        states = self.text_encoder.model.language_model(input_ids=token_ids, use_cache=False)
        is_text = token_ids[:, self.start :] != self.pad_id
        return states.last_hidden_state[:, self.start :], is_text

    def velocity(self, latents: Tensor, sigmas: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity `(B, 64, 4 C)` at noise levels `(B,)`."""
        prediction: tuple[Tensor] = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=text[0],
            encoder_hidden_states_mask=text[1],
            timestep=sigmas,
            img_shapes=[[(1, PACKED_SIDE, PACKED_SIDE)]],
            return_dict=False,
        )
        return prediction[0]


def save_pipeline(
    network: QwenNetwork, vae: AutoencoderKLQwenImage, tokenizer: Qwen2Tokenizer, folder: Path
) -> None:
    """Writes a complete half-precision QwenImagePipeline folder."""
    network, vae = copy.deepcopy(network), pipeline_folder.without_origin(vae)
    vae.register_to_config(_sample_size=shapes.IMAGE_SIZE)  # for the export, see its qwen_image.py
    pipeline = QwenImagePipeline(
        scheduler=flux_model.scheduler(),
        vae=vae,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        transformer=network.transformer,
    )
    pipeline_folder.save(pipeline, folder)
