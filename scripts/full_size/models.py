"""Configurations of the published checkpoints, as in their repositories' config.json files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scripts.full_size.encoders import (
    CLIP_L,
    LLAMA_8B,
    MISTRAL_3,
    PROJECTED_CLIP_G,
    PROJECTED_CLIP_L,
    QWEN3_4B,
    QWEN_VL_7B,
    T5_XXL,
    UMT5_XXL,
    Config,
)

_FLUX_DEV: Config = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
_FLUX_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
_QWEN_IMAGE: Config = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
_QWEN_VAE: Config = {
    "_class_name": "AutoencoderKLQwenImage",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_HUNYUAN_VIDEO: Config = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}
_HUNYUAN_VAE: Config = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "block_out_channels": [128, 256, 512, 512],
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
}
_Z_IMAGE: Config = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
_SD35_MEDIUM: Config = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": list(range(13)),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
_SD35_LARGE: Config = {
    **_SD35_MEDIUM,
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
    "num_attention_heads": 38,
    "num_layers": 38,
    "pos_embed_max_size": 192,
}
_SD3_VAE: Config = {**_FLUX_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
# Of FLUX.2-dev: the defaults of both classes.
_FLUX2_DEV: Config = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": True,
    "in_channels": 128,
    "joint_attention_dim": 15360,
    "mlp_ratio": 3.0,
    "num_attention_heads": 48,
    "num_layers": 8,
    "num_single_layers": 48,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
_FLUX2_VAE: Config = {
    "_class_name": "AutoencoderKLFlux2",
    "batch_norm_eps": 1e-4,
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 32,
    "sample_size": 1024,
}
_WAN_14B: Config = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
_WAN_1B: Config = {**_WAN_14B, "ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}
_WAN_VAE: Config = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_UNIPC: Config = {
    "_class_name": "UniPCMultistepScheduler",
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "use_flow_sigmas": True,
}
_SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "num_train_timesteps": 1000,
}


@dataclass(frozen=True)
class FullSize:
    """A published checkpoint: its pipeline class, configurations by folder, a size to export.

    `index` is what model_index.json has besides its parts.
    """

    pipeline: str
    transformer: Config
    vae: Config
    scheduler: Config
    encoders: Mapping[str, Config]
    size: Mapping[str, int]
    transformer_2: Config | None = None
    index: Config = field(default_factory=dict)


MODELS: Mapping[str, FullSize] = {
    "FLUX.1-dev": FullSize(
        pipeline="FluxPipeline",
        transformer=_FLUX_DEV,
        vae=_FLUX_VAE,
        scheduler={
            **_SCHEDULER,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "shift": 3.0,
            "use_dynamic_shifting": True,
        },
        encoders={"text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
        size={"height": 1024, "width": 1024},
    ),
    "Qwen-Image": FullSize(
        pipeline="QwenImagePipeline",
        transformer=_QWEN_IMAGE,
        vae=_QWEN_VAE,
        scheduler={
            **_SCHEDULER,
            "max_image_seq_len": 8192,
            "max_shift": 0.9,
            "shift": 1.0,
            "shift_terminal": 0.02,
            "use_dynamic_shifting": True,
        },
        encoders={"text_encoder": QWEN_VL_7B},
        size={"height": 1328, "width": 1328},
    ),
    "HunyuanVideo": FullSize(
        pipeline="HunyuanVideoPipeline",
        transformer=_HUNYUAN_VIDEO,
        vae=_HUNYUAN_VAE,
        scheduler={**_SCHEDULER, "shift": 7.0, "use_dynamic_shifting": False},
        encoders={"text_encoder": LLAMA_8B, "text_encoder_2": CLIP_L},
        size={"height": 720, "width": 1280, "frames": 129},
    ),
    "Z-Image": FullSize(
        pipeline="ZImagePipeline",
        transformer=_Z_IMAGE,
        vae=_FLUX_VAE,  # it has FLUX.1's
        scheduler={**_SCHEDULER, "shift": 6.0, "use_dynamic_shifting": False},
        encoders={"text_encoder": QWEN3_4B},
        size={"height": 1024, "width": 1024},
    ),
    **{
        name: FullSize(
            pipeline="StableDiffusion3Pipeline",
            transformer=transformer,
            vae=_SD3_VAE,
            scheduler={
                **_SCHEDULER,
                "max_image_seq_len": 4096,
                "max_shift": 1.15,
                "shift": 3.0,
                "use_dynamic_shifting": False,
            },
            encoders={
                "text_encoder": PROJECTED_CLIP_L,
                "text_encoder_2": PROJECTED_CLIP_G,
                "text_encoder_3": T5_XXL,
            },
            size={"height": 1024, "width": 1024},
        )
        for name, transformer in {
            "SD3.5-medium": _SD35_MEDIUM,
            "SD3.5-large": _SD35_LARGE,
        }.items()
    },
    "FLUX.2-dev": FullSize(
        pipeline="Flux2Pipeline",
        transformer=_FLUX2_DEV,
        vae=_FLUX2_VAE,
        scheduler={**_SCHEDULER, "shift": 3.0, "use_dynamic_shifting": True},
        encoders={"text_encoder": MISTRAL_3},
        size={"height": 1024, "width": 1024},
    ),
    "Wan2.1-T2V-1.3B": FullSize(
        pipeline="WanPipeline",
        transformer=_WAN_1B,
        vae=_WAN_VAE,
        scheduler=_UNIPC,
        encoders={"text_encoder": UMT5_XXL},
        size={"height": 480, "width": 832, "frames": 81},
    ),
    "Wan2.2-T2V-A14B": FullSize(
        pipeline="WanPipeline",
        transformer=_WAN_14B,
        vae=_WAN_VAE,
        scheduler=_UNIPC,
        encoders={"text_encoder": UMT5_XXL},
        size={"height": 480, "width": 832, "frames": 81},
        transformer_2=_WAN_14B,
        index={"boundary_ratio": 0.875, "expand_timesteps": False},
    ),
}
