"""The denoising loop in torch: what a user runs who has no engine."""

from __future__ import annotations

from typing import Any

import torch

from meancache_trt.meancache.schedule import Schedule

_PATCH = 16  # pixels a side of a token: the VAE's eight times a patch of two
_GUIDANCE = 3.5
_TIME_UNITS = 1000.0  # FluxTransformer2DModel multiplies its timestep by this


class TorchLoop:
    """A FLUX transformer with fixed random inputs, run by a schedule's table.

    The latent is float32, the network in its own dtype, as in the engine's loop.
    """

    def __init__(self, network: Any, side: int, text_tokens: int, device: str) -> None:
        self._network = network
        config = network.config
        dtype = next(network.parameters()).dtype
        tokens = (side // _PATCH) ** 2
        self._dtype = dtype
        self._latent = torch.randn(1, tokens, config.in_channels, device=device)
        self._feeds = {
            "encoder_hidden_states": torch.randn(
                1, text_tokens, config.joint_attention_dim, device=device, dtype=dtype
            ),
            "pooled_projections": torch.randn(
                1, config.pooled_projection_dim, device=device, dtype=dtype
            ),
            "guidance": torch.full((1,), _GUIDANCE, device=device),
            "img_ids": torch.zeros(tokens, 3, device=device),
            "txt_ids": torch.zeros(text_tokens, 3, device=device),
            "return_dict": False,
        }

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> torch.Tensor:
        """The final latent of one picture; returns before a GPU is done."""
        latent = self._latent
        velocities: list[torch.Tensor] = []
        for timestep, weights in zip(schedule.timesteps(), schedule.weights, strict=True):
            time = torch.full((1,), float(timestep) / _TIME_UNITS, device=latent.device)
            given = {"hidden_states": latent.to(self._dtype), "timestep": time, **self._feeds}
            velocity = self._network(**given)[0].float()
            velocities.insert(0, velocity)
            for weight, past in zip(weights, velocities, strict=False):
                latent = latent + float(weight) * past
        return latent
