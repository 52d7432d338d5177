"""Diffusers pipelines, bundles of their transformers, and calls of them at any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2Pipeline, FluxPipeline

from meancache_trt.bundle import Bundle
from meancache_trt.engine_transformer import EngineTransformer

HEIGHT, WIDTH, STEPS = 32, 48, 6

VELOCITY_TOLERANCE = 1e-5
"""Float32 kernels unlike torch's, on velocities near 1; measured 1e-6, and the issue asks for 1e-4.
"""

LATENT_TOLERANCE = 2e-5
"""Six such evaluations, guidance over their differences among them; measured 2e-6. The issue asks
for 1e-3."""


@dataclass(frozen=True)
class Subject:
    """A diffusers pipeline and a bundle of its transformer."""

    pipeline: Any
    bundle: Bundle

    def engine(self) -> EngineTransformer:
        return EngineTransformer(self.bundle)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask(lengths: list[int], tokens: int) -> torch.Tensor:
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def flux_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    ids = FluxPipeline._prepare_latent_image_ids(batch, rows, columns, "cpu", torch.float32)
    return {
        "hidden_states": random(batch, rows * columns, 16),
        "encoder_hidden_states": random(batch, text, 48, seed=1),
        "pooled_projections": random(batch, 40, seed=2),
        "timestep": torch.linspace(0.3, 0.9, batch),
        "guidance": torch.full([1], 3.5).expand(batch),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


def qwen_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, rows * columns, 16),
        "encoder_hidden_states": random(batch, text, 48, seed=1),
        "timestep": torch.linspace(0.3, 0.9, batch),
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


def hunyuan_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, 3, 2 * rows, 2 * columns),
        "encoder_hidden_states": random(batch, text, 48, seed=1),
        "encoder_attention_mask": mask([text - index for index in range(batch)], text).float(),
        "pooled_projections": random(batch, 40, seed=2),
        "timestep": torch.linspace(300, 900, batch),
        "guidance": torch.full([batch], 4500.0),
    }


def z_image_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    """Of prompts whose lengths are padded to different multiples of 32."""
    return {
        "x": list(random(batch, 4, 1, 2 * rows, 2 * columns)),
        "t": torch.linspace(0.3, 0.9, batch),
        "cap_feats": [random(text + 30 * index, 48, seed=index) for index in range(batch)],
    }


def sd3_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 16, 2 * rows, 2 * columns),
        "encoder_hidden_states": random(batch, text, 48, seed=1),
        "pooled_projections": random(batch, 40, seed=2),
        "timestep": torch.linspace(300, 900, batch),
    }


def flux2_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    features = random(batch, text, 48, seed=1)
    return {
        "hidden_states": random(batch, rows * columns, 16),
        "encoder_hidden_states": features,
        "timestep": torch.linspace(0.3, 0.9, batch),
        "guidance": torch.full([1], 3.5).expand(batch),
        "img_ids": Flux2Pipeline._prepare_latent_ids(torch.empty(batch, 1, rows, columns)),
        "txt_ids": Flux2Pipeline._prepare_text_ids(features),
    }


def wan_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, 3, 2 * rows, 2 * columns),
        "encoder_hidden_states": random(batch, text, 48, seed=1),
        "timestep": torch.linspace(300, 900, batch),
    }


CALLS: dict[str, Callable[[int, int, int, int], dict[str, Any]]] = {
    "flux": flux_call,
    "qwen": qwen_call,
    "hunyuan": hunyuan_call,
    "z_image": z_image_call,
    "sd3": sd3_call,
    "flux2": flux2_call,
    "wan": wan_call,
}


def assert_equal_velocities(subject: Subject, call: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        (expected,) = subject.pipeline.transformer(**call, return_dict=False)
        (found,) = subject.engine()(**call, return_dict=False)
    if isinstance(expected, list):  # Z-Image's
        assert isinstance(found, list)
        found, expected = torch.stack(found), torch.stack(expected)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=VELOCITY_TOLERANCE)
    velocity: torch.Tensor = found
    return velocity
