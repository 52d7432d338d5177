from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_flux2 import Flux2TimestepGuidanceEmbeddings
from torch import nn

from meancache_trt.export.timesteps import exact_times, fixed_timestep_frequencies


@pytest.mark.parametrize("is_cosine_first", [True, False])
@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (1, 1000)])
def test_fixed_frequencies_give_the_same_bits(
    *, is_cosine_first: bool, shift: int, scale: int
) -> None:
    network = nn.Sequential(Timesteps(256, is_cosine_first, shift, scale))
    timesteps = torch.linspace(0, 1000, 101)
    expected = network(timesteps)
    with fixed_timestep_frequencies(network):
        assert not isinstance(network[0], Timesteps)
        assert torch.equal(network(timesteps), expected)
    assert isinstance(network[0], Timesteps)


def test_an_exact_timestep_is_rounded_with_its_waves_alone() -> None:
    embedding = Flux2TimestepGuidanceEmbeddings(64, 16).bfloat16()
    timesteps = torch.tensor([987.0, 4.0])  # 988 in bfloat16
    guidance = torch.tensor([3500.0, 1004.0])
    waves = [embedding.time_proj(value).bfloat16() for value in (timesteps, guidance)]
    expected = embedding.timestep_embedder(waves[0]) + embedding.guidance_embedder(waves[1])
    with exact_times(embedding) as times:
        times.values = (timesteps, guidance)
        found = embedding(timesteps.bfloat16(), guidance.bfloat16())
    assert torch.equal(found, expected)
    assert not torch.equal(found, embedding(timesteps.bfloat16(), guidance.bfloat16()))
    assert not any(module._forward_pre_hooks for module in embedding.modules())
